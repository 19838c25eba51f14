"""Reading a command line and answering it: flags, presets, layers of settings, lists, text for a terminal."""
