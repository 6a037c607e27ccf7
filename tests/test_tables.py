"""Tables in the output of commands."""

from dist_contrastive.tables import format_table, print_table


def test_numbers_stand_to_the_right_and_text_to_the_left():
    rows = [("train-00000.tar", 12, "1.5 MiB"), ("b", None, "1,024.0 MiB")]
    assert format_table(["shard", "samples", "size"], rows, "two shards") == (
        "two shards\n"
        "shard            samples         size\n"
        "train-00000.tar       12      1.5 MiB\n"
        "b                      ?  1,024.0 MiB"
    )


def test_columns_without_names_have_no_header():
    assert format_table(["", ""], [("a", "[b]"), ("cc", ":smile:")]) == "a   [b]\ncc  :smile:"


def test_text_is_wrapped_between_words_and_words_are_never_cut():
    path = "/folder" * 40
    rows = [(path, "as many words as there are here")]
    lines = format_table(["path", "what"], rows, width=120).split("\n")
    assert lines[1].split()[0] == path
    assert " ".join(" ".join(lines[1:]).split()[1:]) == "as many words as there are here"
    wrapped = format_table(["what"], [("word " * 100,)], width=120).split("\n")
    assert 115 <= len(wrapped[1]) <= 120


def test_outside_of_a_terminal_each_row_is_a_line(capsys):
    print_table(["what"], [("word " * 1000,), ("a b",)])
    assert capsys.readouterr().out.split("\n") == ["what", "word " * 999 + "word", "a b", ""]
