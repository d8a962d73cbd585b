"""Which rows are samples, and of which shape."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jsparse.texts.reading import Reading
from jsparse.texts.shapes import (
    BadShape,
    Completion,
    Conversation,
    Document,
    Instruction,
    Preference,
    read_record,
)

ASKED, ANSWERED = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
TALK = Conversation([ASKED, ANSWERED], None)
RULE = {"role": "system", "content": "be kind"}
RULED = Conversation([RULE, ASKED, ANSWERED], None)


@pytest.mark.parametrize(
    ("row", "record", "unread"),
    [
        ({"text": "words", "meta": {"source": "c4"}}, Document("words"), {"meta"}),
        ({"prompt": "a", "completion": "b", "id": 3}, Completion("a", "b"), {"id"}),
        ({"prompt": "a", "completion": ""}, Completion("a", ""), set()),
        ({"prompt": "a", "completion": " \n"}, Completion("a", " \n"), set()),
        ({"instruction": "a", "output": "b", "file": "x.pdf"}, Instruction("a", "", "b", ""), {"file"}),
        ({"instruction": "a", "input": None, "output": "b"}, Instruction("a", "", "b", ""), set()),
        ({"instruction": "a", "input": " ", "output": ""}, Instruction("a", "", "", ""), set()),
        (
            {"instruction": "a", "input": "b", "output": "c", "text": "d"},
            Instruction("a", "b", "c", ""),
            {"text"},
        ),
        ({"messages": [ASKED, ANSWERED], "prompt": "hi"}, TALK, {"prompt"}),
        ({"messages": None, "text": "words"}, Document("words"), {"messages"}),
        ({"prompt": None, "completion": None, "text": "words"}, Document("words"), {"prompt", "completion"}),
        ({"messages": [ASKED, ANSWERED | {"tool_calls": None}]}, TALK, set()),
        ({"messages": json.dumps([ASKED, ANSWERED]), "tools": ""}, TALK, set()),
        ({"messages": [ASKED, ANSWERED], "tools": []}, TALK, set()),
        (
            {"messages": [ASKED, ANSWERED], "tools": '[{"name": "f"}]', "system": "be kind"},
            Conversation([{"role": "system", "content": "be kind"}, ASKED, ANSWERED], [{"name": "f"}]),
            set(),
        ),
        ({"messages": [RULE, ASKED, ANSWERED], "system": "be kind"}, RULED, set()),
        ({"conversations": [ASKED, ANSWERED]}, TALK, set()),
        (
            {
                "conversations": [
                    {"from": "human", "value": "hi", "role": None},
                    {"from": "gpt", "value": "yo", "role": None},
                ]
            },
            TALK,
            set(),
        ),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}, TALK, set()),
        (
            {
                "conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}],
                "system": "s",
            },
            Conversation([{"role": "system", "content": "s"}, ASKED, ANSWERED], None),
            set(),
        ),
    ],
)
def test_rows_that_people_have(row, record, unread):
    assert read_record(row, {}) == (record, unread)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, r" has the fields \[\]; a row must be .*--fields"),
        ({"prompt": "a"}, r" has the fields \['prompt'\]"),
        ({"text": 5}, '"text" must be a string, not 5'),
        ({"text": None}, '"text" must be a string, not null'),
        ({"text": "\n"}, '"text" is .*; it must hold some text'),
        ({"text": "\ud800"}, r""""text" holds '\\ud800', which is not Unicode"""),
        ({"prompt": "", "completion": "a"}, '"prompt" is .*; it must'),
        ({"messages": None, "text": None}, '"messages" must be a list of messages, not null'),
        ({"prompt": "a", "completion": None}, '"completion" must be a string, not null'),
        ({"messages": []}, '"messages" must be a list of messages, not'),
        ({"messages": "hi"}, '"messages" is a text that is not JSON'),
        ({"messages": [{"content": "hi"}]}, r'messages\[0\] must have a text as "role", not'),
        ({"messages": [ASKED]}, "has no message of the assistant"),
        ({"messages": [{"role": "gpt", "content": "yo"}]}, r'of the assistant.*; its roles are \["gpt"\]'),
        (
            {"messages": [RULE, ASKED, ANSWERED], "system": "be rude"},
            '"system" and the first message are two',
        ),
        ({"messages": [ASKED, ANSWERED], "tools": "f"}, '"tools" is a text that is not JSON'),
        ({"messages": [ASKED, ANSWERED], "tools": {"a": 1}}, '"tools" must be a list'),
        (
            {"conversations": [{"from": "stranger", "value": "hi"}]},
            r"conversations\[0\] is from .stranger.; allowed",
        ),
        (
            {"conversations": [{"from": "gpt", "value": 3}]},
            r"conversations\[0\].value must be a string, not 3",
        ),
    ],
)
def test_rows_that_are_no_samples(row, message):
    with pytest.raises(BadShape, match=message):
        read_record(row, {})


MENTIONED = {"type": "text", "text": "hi"}


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        (
            [{"role": "user", "value": "hi"}, ANSWERED],
            r'messages\[0\] has no "content", but \["role", "value"\]',
        ),
        ([{"role": "user", "content": None}, ANSWERED], r'messages\[0\] has no "content", but \["role"\]'),
        ([ASKED, {"role": "assistant"}], r'messages\[1\] has no "content"'),
        (
            [{"role": "user", "content": 5}, ANSWERED],
            r"messages\[0\].content must be a text or a list of texts, not 5",
        ),
        (
            [{"role": "user", "content": {}}, ANSWERED],
            r"messages\[0\].content must be a text or a list of texts",
        ),
        (
            [{"role": "user", "content": [MENTIONED, {"type": "image_url", "image_url": "a"}]}, ANSWERED],
            r'messages\[0\].content\[1\] is no text, but {"type": "image_url"',
        ),
        (
            [ASKED, ANSWERED | {"weight": 0}],
            r'messages\[1\] has "weight": 0; all that the assistant says is learned',
        ),
        ([ASKED, ANSWERED | {"train": False}, ASKED, ANSWERED], r'messages\[1\] has "train": false'),
        ([ASKED, ANSWERED | {"weight": 0.5}], r'messages\[1\] has "weight": 0.5'),
    ],
)
def test_messages_that_say_nothing_or_are_not_learned(messages, why):
    for row in ({"messages": messages}, {"conversations": messages}):
        with pytest.raises(BadShape, match=why):
            read_record(row, {})


def test_messages_as_they_may_be():
    called = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    for messages in (
        [ASKED, called, {"role": "tool", "content": {"degrees": 20}}, ANSWERED],
        [ASKED, {"role": "assistant", "reasoning_content": "hm"}],
        [{"role": "user", "content": [MENTIONED, "more"]}, ANSWERED | {"weight": 1, "train": True}],
        [ASKED | {"weight": 0}, ANSWERED],
    ):
        record, _ = read_record({"messages": messages}, {})
        assert record == Conversation(messages, None)


def test_a_pair_reads_what_its_answers_read():
    """What goes through a chat template is named as not read beside a prompt that is a text."""
    texts = {
        "prompt": "hi",
        "chosen": "yo",
        "rejected": "no",
        "system": "be kind",
        "tools": "[]",
        "input": "a",
    }
    plain = Preference(Completion("hi", "yo"), Completion("hi", "no"))
    assert read_record(texts, {}, pairs=True) == (plain, {"system", "tools", "input"})
    orca = {"question": "hi", "chosen": "yo", "rejected": "no", "system": "be kind", "tools": None}
    assert read_record(orca, {"prompt": "question"}, pairs=True) == (plain, {"system", "tools"})
    pair, unread = read_record(orca, {"instruction": "question"}, pairs=True)
    asked = (Instruction("hi", "", answer, "be kind") for answer in ("yo", "no"))
    assert (pair, unread) == (Preference(*asked), {"tools"})
    row = {"prompt": [ASKED], "chosen": [ANSWERED], "rejected": [ANSWERED | {"content": "no"}], "input": None}
    assert read_record(row | {"system": "be kind"}, {}, pairs=True)[1] == {"input"}


def test_nulls_of_tables_in_pairs():
    row = {"prompt": "hi", "chosen": "yo", "rejected": "no", "instruction": None}
    plain = Preference(Completion("hi", "yo"), Completion("hi", "no"))
    assert read_record(row, {}, pairs=True)[0] == plain
    # Columns of messages differ in their fields; the question is still there once.
    other = {"role": "assistant", "content": "no"}
    pair = Preference(TALK, Conversation([ASKED, other], None))
    nulls = {"name": None, "tool_calls": None}
    for asked, answered in (({}, nulls), (nulls, {}), (nulls, {"id": None})):
        row = {
            "prompt": [ASKED | asked],
            "chosen": [ASKED | answered, ANSWERED | answered],
            "rejected": [ASKED | answered, other | answered],
        }
        assert read_record(row, {}, pairs=True)[0] == pair


@pytest.mark.parametrize("said", [{"weight": 0.0}, {"train": False}])
def test_turns_that_are_not_to_be_learned(said):
    turns = [{"from": "human", "value": "hi", "weight": 0}, {"from": "gpt", "value": "yo"}]
    (name,) = said
    with pytest.raises(BadShape, match=rf'messages\[1\] has "{name}": .* is learned'):
        read_record({"conversations": [turns[0], turns[1] | said]}, {})
    for fine in ({}, {"weight": 1.0}, {"train": True}, {"weight": None}):  # as SlimOrca has them
        record, _ = read_record({"conversations": [turns[0], turns[1] | fine]}, {})
        assert isinstance(record, Conversation)
        assert [message["content"] for message in record.messages] == ["hi", "yo"]


def test_a_shape_without_any_of_the_named_fields_is_not_taken():
    """With one name misspelt, the other shape that a row has is not what was asked for."""
    row = {"question": "a", "answer": "b", "text": "c"}
    fields = {"prompt": "questoin", "completion": "answer"}
    with pytest.raises(BadShape, match="has no questoin, which --fields names"):
        read_record(row, fields)
    talk = {"messages": [ASKED, ANSWERED], "body": "words", "context": "d"}
    assert read_record(talk, {"text": "body"}) == (Document("words"), {"messages", "context"})
    with pytest.raises(BadShape, match=r"has the fields .* and no shape with context, which --fields names"):
        read_record(talk, {"input": "context"})
    row = {"instruction": "a", "response": "b"}  # "input" may be left out
    named = {"input": "context", "output": "response"}
    assert read_record(row, named)[0] == Instruction("a", "", "b", "")


def test_fields_of_other_names():
    assert read_record(
        {"question": "a", "answer": "b", "prompt": "c"}, {"prompt": "question", "completion": "answer"}
    ) == (
        Completion("a", "b"),
        {"prompt (not read)"},
    )
    swapped = {"prompt": "text", "completion": "prompt"}
    assert read_record({"text": "a", "prompt": "b"}, swapped) == (Completion("a", "b"), set())
    with pytest.raises(BadShape, match="none of --fields: question"):
        read_record({"text": "a"}, {"prompt": "question"})
    with pytest.raises(BadShape, match=r"has no answer, which --fields names, but the fields \['question'\]"):
        read_record({"question": "a"}, {"prompt": "question", "completion": "answer"})


@given(st.dictionaries(st.sampled_from(["text", "prompt", "completion", "x"]), st.text("ab", min_size=1)))
def test_every_field_is_read_or_named(row):
    try:
        record, unread = read_record(row, {})
    except BadShape:
        assert not {"text"} <= row.keys() and not {"prompt", "completion"} <= row.keys()
        return
    assert sorted([*map(str, record), *(row[name] for name in unread)]) == sorted(row.values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_on": "prompts"}, "loss_on must be one of 'answers', 'all', not 'prompts'"),
        ({"bad_rows": "drop"}, "bad_rows must be one of 'error', 'skip'"),
        ({"too_long": "cut"}, "too_long must be one of 'error', 'skip', 'truncate'"),
        (
            {"fields": {"question": "prompt"}},
            "fields: question cannot be read from other names; allowed are .*, each before its name",
        ),
        ({"fields": {"prompt": "a", "completion": "a"}}, "fields reads a as several fields"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        Reading(**settings)
