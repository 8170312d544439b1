"""The commands, one file per group. They parse arguments, call the API or a stage, and print."""
