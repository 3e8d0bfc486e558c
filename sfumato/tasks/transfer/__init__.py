"""Transfer items to another class: the task, and the search for a map between two classes."""
