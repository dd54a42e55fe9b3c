"""What survives a kill: a file replaced whole, a folder sealed whole, a lock, a log of lines; JSON and YAML in them."""
