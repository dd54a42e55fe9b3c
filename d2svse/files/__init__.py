"""Files and folders that stay whole after a kill: replaced files, sealed folders, locks, logs, JSON and YAML."""
