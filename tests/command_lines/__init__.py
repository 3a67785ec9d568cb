"""Tables of command lines, one file per subject: LINES of (arguments, exit code, text that the answer contains), in a
folder that `prepare(folder)` fills where there is one. tests/test_command_lines.py runs them."""
