"""The text table of attention layers: which rows become one."""

from spanopt.table import collapsed


def test_only_rows_that_are_alike_and_follow_each_other_are_collapsed():
    names = ["d.0.a.1", "d.0.b.1", "d.1.a.1", "d.1.b.1", "d.2.a.1", "d.2.b.1", "d.4.a.1", "e.3.a.1"]
    rows = [(name, "x" if "a" in name else "y") for name in names]
    assert collapsed(rows) == [
        ("d.0.a.1 to d.2.a.1", "x"),
        ("d.0.b.1 to d.2.b.1", "y"),
        ("d.4.a.1", "x"),
        ("e.3.a.1", "x"),
    ]
    assert collapsed([("a.0", "x"), ("a.1", "y"), ("a.2", "x")]) == [
        ("a.0", "x"),
        ("a.1", "y"),
        ("a.2", "x"),
    ]
