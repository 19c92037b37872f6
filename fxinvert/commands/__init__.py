"""What the command line does: configuration, runs, the demonstration, and looking."""
