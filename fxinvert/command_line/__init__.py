"""The commands as one writes them: arguments and options, and the call of what does the work."""
