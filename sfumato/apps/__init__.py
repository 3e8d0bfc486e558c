"""User interfaces of the tasks: the command line."""
