"""Instruction tuning: what is learnt of a conversation, counted by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from bidora.data.load import load_source
from bidora.data.source import Source
from bidora.data.table import Table
from bidora.errors import UserError
from bidora.models import find_model, load_base
from bidora.tasks import Schema
from bidora.tasks.chat import encode_chat, open_prompt
from bidora.tasks.guess import guess_task_type
from bidora.tasks.instruction import Instruction
from bidora.tasks.registry import make_task
from tests.bidora.language_models import (
    CHAT_TEMPLATE,
    MARKED_TEMPLATE,
    tokenizer_of_bytes,
    tokenizer_of_words,
)

CHAT = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "yes no"},
    {"role": "user", "content": "What ?"},
    {"role": "assistant", "content": "Bye"},
]
TASK = Instruction()
OF_CHATS = Schema(
    "instruction", {"text_column": "messages"}, details={"format": "chat"}
)


def source(*rows: tuple[Any, ...], columns: tuple[str, ...] = ("messages",)) -> Source:
    lines = tuple(f"line {i}" for i in range(1, len(rows) + 1))
    return Source("t.jsonl", {"train": Table("t.jsonl", columns, rows, lines)})


def words(ids: list[int], tokenizer: Any) -> list[str]:
    return tokenizer.convert_ids_to_tokens(ids)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED_TEMPLATE])
def test_every_turn_of_the_assistant_is_learnt_and_nothing_else(template: str) -> None:
    tokenizer = tokenizer_of_words(template=template)
    ids, is_answer = encode_chat(CHAT, tokenizer)
    whole = "<|user|> Hello </s> \n <|assistant|> yes no </s> \n "
    whole += "<|user|> What ? </s> \n <|assistant|> Bye </s> \n"
    assert words(ids, tokenizer) == whole.replace(" \n", " #").replace("#", "\n").split(
        " "
    )
    learnt = [i for i, answer in zip(ids, is_answer, strict=True) if answer]
    assert words(learnt, tokenizer) == ["yes", "no", "</s>", "Bye", "</s>"]


def test_labels_are_tokens_or_ignored() -> None:
    tokenizer = tokenizer_of_words(template=CHAT_TEMPLATE)
    rows = TASK.rows(source((CHAT,)).train, OF_CHATS)
    assert rows.columns["labels"] == [[1, 3]]
    made = TASK.features(rows.columns, tokenizer, OF_CHATS, 99)
    (ids,), (labels,) = made["input_ids"], made["labels"]
    assert {label for label in labels if label not in ids} == {-100}
    assert sum(label != -100 for label in labels) == 5


def test_new_rows_end_where_the_assistant_is_called_on() -> None:
    tokenizer = tokenizer_of_words(template=CHAT_TEMPLATE)
    for chat in (CHAT, CHAT[:3]):
        rows = TASK.rows(source((chat,)).train, OF_CHATS, labelled=False)
        made = TASK.features(rows.columns, tokenizer, OF_CHATS, 99)
        assert "labels" not in made
        assert words(made["input_ids"][0], tokenizer)[-6:] == [
            "<|user|>",
            "What",
            "?",
            "</s>",
            "\n",
            "<|assistant|>",
        ]


def test_prompt_and_completion_stand_as_they_are() -> None:
    tokenizer = tokenizer_of_words()
    data = source(("What ?\n", "yes no"), columns=("prompt", "completion"))
    assert guess_task_type(data, {})[0] == "instruction"
    schema = TASK.schema(data)
    assert schema.details == {"format": "prompt-completion"}
    rows = TASK.rows(data.train, schema)
    made = TASK.features(rows.columns, tokenizer, schema, 99)
    assert words(made["input_ids"][0], tokenizer) == [
        *("What", "?", "\n", "yes", "no", "</s>")
    ]
    assert made["labels"][0][:3] == [-100] * 3
    assert made["labels"][0][3:] == made["input_ids"][0][3:]


def test_answers_are_cut_and_counted_and_prompts_are_refused() -> None:
    tokenizer = tokenizer_of_words(template=CHAT_TEMPLATE)
    rows = TASK.rows(source((CHAT,), (CHAT[:2],)).train, OF_CHATS)
    # By hand: 4 tokens of the first question, the call, 3 of the answer, a line's end.
    assert TASK.count_over_long(rows, tokenizer, 9) == 1
    made = TASK.features(rows.columns, tokenizer, OF_CHATS, 9)
    assert [len(x) for x in made["labels"]] == [9, 9]
    TASK.check_lengths(rows, tokenizer, OF_CHATS, 6, None)
    said = (
        r"^2 prompt.* 5 tokens.*--max-length 5 .*\(t.jsonl, line 1; t.jsonl, line 2\)"
    )
    with pytest.raises(UserError, match=said):
        TASK.check_lengths(rows, tokenizer, OF_CHATS, 5, None)


@pytest.mark.parametrize(
    ("chat", "said"),
    [
        (CHAT[:1], "no turn of the assistant"),
        ([], "holds no conversation"),
        ("Hello", "holds no conversation"),
        ([{"role": "user"}], "turn 1 has no role and content"),
        ([{"role": "tool", "content": "4"}], "turn 1 is by 'tool'; roles are system"),
        ([{"role": "user", "content": " "}], "turn 1 .user. has no text"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            "turn 1 .user. has no text",
        ),
        ([{"from": "function", "value": "4"}], "turn 1 is by 'function'; roles are"),
        ([{"from": "human"}], "turn 1 has no role and content"),
        ([{"from": ["human"], "value": "4"}], "turn 1 is by .*; roles are"),
        ([{**CHAT[0], "tool_calls": [1]}], "turn 1 has 'tool_calls' too"),
    ],
)
def test_each_bad_conversation_is_told_with_its_place(chat: Any, said: str) -> None:
    rows = TASK.rows(source((CHAT,), (chat,)).train, OF_CHATS)
    assert len(rows) == 1
    with pytest.raises(AssertionError, match=said):
        assert not rows.bad, rows.bad[0]
    assert rows.bad[0].startswith("t.jsonl, line 2: column 'messages' ")


def test_turns_in_other_forms_are_the_same_turns() -> None:
    shared = [
        {
            "from": {"user": "human", "assistant": "gpt"}[t["role"]],
            "value": t["content"],
        }
        for t in CHAT
    ]
    data = source((shared,), columns=("conversations",))
    assert guess_task_type(data, {})[0] == "instruction"
    schema = TASK.schema(data)
    assert schema.settings["text_column"] == "conversations"
    assert TASK.rows(data.train, schema).columns["messages"] == [CHAT]
    in_parts = [
        {
            **t,
            "content": [
                {"type": "text", "text": t["content"][:2]},
                {"text": t["content"][2:]},
            ],
        }
        for t in CHAT
    ]
    assert TASK.rows(source((in_parts,)).train, OF_CHATS).columns["messages"] == [CHAT]


def test_a_prompt_in_two_columns() -> None:
    columns = ("instruction", "input", "output")
    rows = (
        ("Add", "2, 2", "4"),
        ("Hi", "", "Hello"),
        ("Hi", None, "Hello"),
        ("", "2", "3"),
    )
    data = source(*rows, columns=columns)
    assert guess_task_type(data, {})[0] == "instruction"
    schema = TASK.schema(data)
    read = TASK.rows(data.train, schema)
    assert read.columns["text"] == ["Add\n\n2, 2", "Hi", "Hi"]
    assert read.columns["labels"] == ["4", "Hello", "Hello"]
    assert [line.split(": ")[0] for line in read.bad] == ["t.jsonl, line 4"]
    assert "column 'input' where it holds something" in TASK.describe({}, schema)[1]
    wrong = TASK.rows(source(("Add", ["2"], "4"), columns=columns).train, schema)
    assert "column 'input' holds a list, and no text" in wrong.bad[0]
    rest = source(("Add", "4"), columns=("instruction", "output")).train
    assert TASK.rows(rest, schema).columns["text"] == ["Add"]
    # One that is chosen is all of the prompt.
    alone = Instruction(text_column="instruction").schema(data)
    assert TASK.rows(data.train, alone).columns["text"] == ["Add", "Hi", "Hi"]
    answers = Instruction(label_column="input").schema(data)
    assert "context" not in answers.details


def test_bad_prompts_and_completions_are_told() -> None:
    rows = ("What", "yes"), ("", "yes"), ("What", " ")
    data = source(*rows, columns=("prompt", "completion"))
    read = TASK.rows(data.train, TASK.schema(data))
    assert [line.split(": ")[0] for line in read.bad] == [
        "t.jsonl, line 2",
        "t.jsonl, line 3",
    ]
    with pytest.raises(UserError, match="leave --label-column out"):
        Instruction(label_column="x").schema(source((CHAT,)))
    with pytest.raises(UserError, match="unknown metric 'bleu'"):
        Instruction(metric="bleu").schema(data)
    with pytest.raises(UserError, match="--text-pair-column has no meaning"):
        Instruction(text_pair_column="x").schema(data)


def test_the_guide_writes_a_folder_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Path(__file__).parents[3] / "docs" / "tasks" / "instruction.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("e2e-dataset").mkdir()
    for part in ("trainset", "devset", "testset_w_refs"):
        lines = f'mr,ref\n"name[{part}], area[city]",A place.\n'
        lines += f'"name[{part}], area[city]",Another.\nname[Café],A café.\n'
        Path(f"e2e-dataset/{part}.csv").write_text(lines, "utf-8")
    exec(code, {})
    data = load_source("pubs")
    assert guess_task_type(data, {})[0] == "instruction"
    assert {part: len(table) for part, table in data.parts.items()} == {
        "train": 2,
        "validation": 2,
        "test": 2,
    }
    assert data.train.rows[0] == (
        "Describe this place in one sentence: name[trainset], area[city]",
        "A place.",
    )


def test_templates_that_do_not_fit_are_told() -> None:
    with pytest.raises(UserError, match=r"has no chat template.*prompt and completion"):
        encode_chat(CHAT, tokenizer_of_words())
    with pytest.raises(UserError, match="has no chat template"):
        open_prompt(CHAT, tokenizer_of_words())
    changes = "{{ messages | length }}" + CHAT_TEMPLATE
    with pytest.raises(UserError, match="in another way once others follow"):
        encode_chat(CHAT, tokenizer_of_words(template=changes))
    refuses = "{{ raise_exception('roles must alternate') }}"
    for template in (refuses, refuses + "{% generation %}{% endgeneration %}"):
        with pytest.raises(UserError, match=r"refuses a conversation \(roles must"):
            encode_chat(CHAT, tokenizer_of_words(template=template))


def marked(answer: str) -> str:
    """Return a template that writes an assistant's turn in that way, with its marks."""
    return (
        "{% for m in messages %}<|{{ m['role'] }}|>{% if m['role'] == 'assistant' %}"
        f"{answer}{{% else %}} {{{{ m['content'] }}}} </s>{{% endif %}}{{{{ '\n' }}}}"
        "{% endfor %}"
    )


@pytest.mark.parametrize(
    "answer",
    [
        " {% generation %}{{ m['content'] }} </s>{% endgeneration %}",
        "{% generation %} {{ m['content'] }} </s>{% endgeneration %}",
        "{%- generation -%} {{ ' ' + m['content'] }} </s>{%- endgeneration %}",
        " {% generation %}{{ m['content'] }} </s> {% endgeneration %}",
        "{% generation %}{% endgeneration %} {% generation %}{{ m['content'] }} "
        "{% endgeneration %}{% generation %}</s>{% endgeneration %}",
    ],
)
@pytest.mark.parametrize("opens", [False, True])
def test_marks_with_blanks_at_their_ends_mean_the_same_answers(
    answer: str, opens: bool
) -> None:
    # This tokenizer has no token for a blank, so that nothing but the answers is there.
    tokenizer = tokenizer_of_words(template=marked(answer))
    ids, is_answer = encode_chat(CHAT[1:] if opens else CHAT, tokenizer)
    learnt = [i for i, answer in zip(ids, is_answer, strict=True) if answer]
    assert words(learnt, tokenizer) == ["yes", "no", "</s>", "Bye", "</s>"]


@pytest.mark.parametrize("said", ["yes", " yes ", "é", "a 🙂", "🙂\n"])
@pytest.mark.parametrize("blank", ["", " "])
@pytest.mark.parametrize("end", ["", "</s>"])
def test_marks_say_what_is_learnt_to_the_letter(
    said: str, blank: str, end: str
) -> None:
    answer = (
        f"{{% generation %}}{blank}{{{{ m['content'] }}}}{end}{{% endgeneration %}}"
    )
    tokenizer = tokenizer_of_bytes(marked(answer))
    chat = [ASKED, {"role": "assistant", "content": said}, ASKED, ANSWERED]
    ids, is_answer = encode_chat(chat, tokenizer)
    learnt = [i for i, answer in zip(ids, is_answer, strict=True) if answer]
    assert tokenizer.decode(learnt) == f"{blank}{said}{end}{blank}yes no{end}"
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    assert tokenizer.decode(ids) == whole
    if end:  # where an answer ends with one token, transformers' own mask is right
        made: Any = tokenizer.apply_chat_template(
            chat, return_dict=True, return_assistant_tokens_mask=True
        )
        assert made["input_ids"] == ids
        assert made["assistant_masks"] == [int(answer) for answer in is_answer]


def test_a_conversation_without_a_token_to_learn_is_told_with_its_place() -> None:
    last_alone = (
        "{% if loop.last and m['content'] != 'no' %}{% generation %}{{ m['content'] }}"
        "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}"
    )
    tokenizer = tokenizer_of_words(template=marked(last_alone))
    unmarked = [ASKED, {"role": "assistant", "content": "no"}]
    rows = TASK.rows(source((CHAT,), (unmarked,)).train, OF_CHATS)
    said = (
        r"t\.jsonl, line 2: the chat template .* \(no token of it is the assistant's\)"
    )
    with pytest.raises(UserError, match=said):
        TASK.check_lengths(rows, tokenizer, OF_CHATS, 99, None)
    assert list(TASK.check_lengths(rows, tokenizer, OF_CHATS, 99, None, skip=True)) == [
        1
    ]
    ids, is_answer = encode_chat(CHAT, tokenizer)
    learnt = [i for i, answer in zip(ids, is_answer, strict=True) if answer]
    assert words(learnt, tokenizer) == ["Bye"]


def test_of_several_templates_the_default_one_is_read() -> None:
    both: Any = {"default": CHAT_TEMPLATE, "tool_use": MARKED_TEMPLATE}
    tokenizer = tokenizer_of_words(template=both)
    assert encode_chat(CHAT, tokenizer) == encode_chat(
        CHAT, tokenizer_of_words(template=CHAT_TEMPLATE)
    )


ASKED, ANSWERED = CHAT[:2]
STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant.') }}{% endif %}{% endfor %}"
) + CHAT_TEMPLATE
STRICT_MARKED = STRICT.replace(CHAT_TEMPLATE, MARKED_TEMPLATE)
WITH_A_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|system|> you are a pub </s>\n{% endif %}"
) + CHAT_TEMPLATE


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED_TEMPLATE, WITH_A_SYSTEM])
@pytest.mark.parametrize("said", ["yes no", "a place", "are you", "\nyes"])
def test_an_answer_that_opens_a_conversation_is_learnt(
    template: str, said: str
) -> None:
    tokenizer = tokenizer_of_words(template=template)
    opening = {"role": "assistant", "content": said}
    ids, is_answer = encode_chat([opening, ASKED, CHAT[3]], tokenizer)
    learnt = [i for i, answer in zip(ids, is_answer, strict=True) if answer]
    told = said.replace("\n", "\n ").split(" ")
    assert words(learnt, tokenizer) == [*told, "</s>", "Bye", "</s>"]


@pytest.mark.parametrize("template", [STRICT, STRICT_MARKED])
def test_a_refused_conversation_is_told_with_its_place(template: str) -> None:
    tokenizer = tokenizer_of_words(template=template)
    twice, opened = [ASKED, ASKED, ANSWERED], [ANSWERED, ASKED, ANSWERED]
    good = [(CHAT[:2],)] * 1200  # more than are counted at once
    data = source(*good[:9], (twice,), *good[9:], (opened,)).train
    rows = TASK.rows(data, OF_CHATS)
    said = (
        r"^2 of 1202 row\(s\) can't be used with this model:\n"
        r"  t\.jsonl, line 10: the chat template of the model's tokenizer refuses it "
        r"\(Roles must alternate user/assistant\)\.\n"
        r"  t\.jsonl, line 1202: .*\nMany want turns of user and assistant one after the "
        r"other, or no system turn\. Put them right"
    )
    with pytest.raises(UserError, match=said):
        TASK.check_lengths(rows, tokenizer, OF_CHATS, 99, None)
    left_out = TASK.check_lengths(rows, tokenizer, OF_CHATS, 99, None, skip=True)
    assert [(i, line.split(":")[0]) for i, line in left_out.items()] == [
        (9, "t.jsonl, line 10"),
        (1201, "t.jsonl, line 1202"),
    ]
    new = TASK.rows(data, OF_CHATS, labelled=False)
    left_out = TASK.check_lengths(new, tokenizer, OF_CHATS, 99, None, skip=True)
    assert list(left_out) == [9, 1201]


def test_of_many_refused_conversations_ten_are_shown_and_long_ones_told_too() -> None:
    tokenizer = tokenizer_of_words(template=STRICT)
    rows = TASK.rows(
        source(*[([ASKED, ASKED, ANSWERED],)] * 12, (CHAT,)).train, OF_CHATS
    )
    said = r"(?s)^12 of 13 row.*line 10: .*\n  and 2 more\nMany .*\n1 prompt.* 5 tokens"
    with pytest.raises(UserError, match=said):
        TASK.check_lengths(rows, tokenizer, OF_CHATS, 5, None)
    left_out = TASK.check_lengths(rows, tokenizer, OF_CHATS, 5, None, skip=True)
    assert list(left_out) == list(range(13))
    assert left_out[12] == (
        "t.jsonl, line 13: its prompt has 5 tokens, and --max-length 5 keeps no token of "
        "an answer."
    )


@pytest.mark.parametrize("task", ["instruction", "generation"])
def test_an_encoder_is_refused_with_models_that_suit_the_task(
    task: str, tmp_path: Path
) -> None:
    from transformers import BertConfig, BertModel

    BertModel(
        BertConfig(
            vocab_size=40,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
        )
    ).save_pretrained(tmp_path)
    tokenizer = tokenizer_of_words()
    tokenizer.save_pretrained(tmp_path)
    found = find_model(str(tmp_path))
    with pytest.raises(UserError, match="no weights of a language model") as told:
        load_base(found, tokenizer, make_task(task), Schema(task))
    assert ("such as a T5" in str(told.value)) is (task == "generation")


def test_models_that_can_not_answer_are_refused() -> None:
    from transformers import BertConfig, T5Config

    with pytest.raises(UserError, match="--task-type generation"):
        TASK.for_model(T5Config())
    with pytest.raises(UserError, match="BertForMaskedLM, which fills gaps"):
        TASK.for_model(BertConfig(architectures=["BertForMaskedLM"]))
