"""What all commands share: flags, a file of flags, signals, exit codes, memory. Imports errors."""
