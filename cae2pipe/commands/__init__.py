"""What the command line can do, a file for each group of commands. They parse, call a stage and print."""
