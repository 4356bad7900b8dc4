"""The `mtd` command line, a file per command."""
