"""How people reach the tasks: the command line; later HTTP and the studio."""
