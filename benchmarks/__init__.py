"""Speed and memory, measured. Not part of the installed package."""
