"""Results as lines."""

from sfumato.apps.format import result_lines


def test_metrics_are_shown_with_their_floors():
    result = {"n": 12345, "cas": None, "fd": 6.12345, "fd_floor": 0.4, "seconds": 3.0, "codec": {"psnr": 20.0}}
    result |= {"accuracy": 0.99, "accuracy_floor": 1.0, "kd_floor": 0.1}
    assert [line.split() for line in result_lines(result)] == [
        ["n", "12,345"],
        ["seconds", "3"],
        ["codec.psnr", "20"],
        ["kd_floor", "0.1"],
        ["value", "floor"],
        ["fd", "6.123", "0.4"],
        ["accuracy", "0.99", "1"],
    ]


def test_plain_entries():
    result = {"shape": [4, 4, 4], "on": True, "sizes": {"codec": 3}, "advice": ["do this", "do that"], "none": []}
    lines = "\n".join(result_lines(result)).splitlines()
    assert [line.split() for line in lines] == [
        ["shape", "4,", "4,", "4"],
        ["on", "yes"],
        ["sizes.codec", "3"],
        ["advice"],
        ["do", "this"],
        ["do", "that"],
        ["none"],
    ]


def test_records_in_a_list_are_a_line_each_without_empty_values():
    columns = [
        {"name": "age", "low": 0, "levels": [], "missing": None, "point": False},
        {"name": "b", "levels": ["x", "y"]},
    ]
    lines = "\n".join(result_lines({"columns": columns})).splitlines()
    assert [line.split() for line in lines[1:]] == [["name", "age", "low", "0"], ["name", "b", "levels", "x,", "y"]]
