from recollect.benchmarks.code_size import WINDOW, duplicated_lines, format_sizes, sizes, statements

FILE = '"""A module."""\n\n\ndef f(x):\n    """Returns x."""\n    # a comment\n    if x: return x\n    return None\n'


def test_docstrings_and_comments_are_no_statements():
    assert statements(FILE) == 4


def test_repeated_windows_are_counted_once_a_line():
    block = "".join(f"x{i} = {i}\n" for i in range(WINDOW))
    assert duplicated_lines({"a/a.py": block + "y = 1\n", "b/b.py": block, "b/c.py": "z = 1\n"}) == {
        "a/a.py": WINDOW,
        "b/b.py": WINDOW,
    }


def test_kernels_and_tests_stand_apart():
    now = sizes({"models/a.py": FILE, "tests/a.py": FILE, "main.py": "x = 1\n"})
    before = sizes({"models/a.py": FILE + "y = 1\n", "pallas_kernels/a.py": FILE})
    rows = {line.split()[0]: line.split()[1:] for line in format_sizes(now, before).splitlines()}
    assert rows["models"][-7:-3] == ["5", "->", "4", "-1"] and rows["code"][-7:-3] == ["5", "->", "5", "+0"]
    assert list(rows)[-3:] == ["pallas_kernels", "tests", "code"]
