"""The first sample of every shape in every kind of file, by transformers. Run with ``-s`` for the table."""

import gzip
import io
import json
import sys
from pathlib import Path

import pytest
from tokenizers import AddedToken, processors

from jsparse.models import byte_tokenizer, load_chat_template, load_tokenizer
from jsparse.texts.documents import read_samples
from jsparse.texts.files import data_files
from jsparse.texts.reading import Reading

transformers = pytest.importorskip("transformers", reason="the oracle is in the extra `parity`")
pyarrow = pytest.importorskip("pyarrow", reason="some kinds of file need the extra `data`")

TEMPLATE = Path(__file__).parents[2] / "data" / "chat_templates" / "generation.jinja"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>")
TOOLS = [{"type": "function", "function": {"name": "now", "description": "The time", "parameters": {}}}]
ASKED = {"role": "user", "content": "Was heißt <b> 日本?"}
TALK = [{"role": "system", "content": "Be kind."}, ASKED, {"role": "assistant", "content": "Ok <b>"}, ASKED]
TALK += [{"role": "assistant", "content": "Bye\n"}]
SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}
ROWS_OF = {
    "text": {"text": "<|im_start|>user\nA <|im_end|> é\r\n", "meta": {"source": "c4"}},
    "prompt, completion": {"prompt": "<|im_start|>user\n2+2?<|im_end|>\n", "completion": " 4 é"},
    "instruction": {"instruction": "Sum up.", "input": "A\nbook é", "output": "Ok", "file": "a.pdf"},
    "messages": {"messages": TALK},
    "messages, tools": {"messages": TALK, "tools": json.dumps(TOOLS)},
    "conversations": {"conversations": [{"from": SPEAKERS[m["role"]], "value": m["content"]} for m in TALK]},
    "pair": {"prompt": "2+2?", "chosen": " 4 é", "rejected": " 5"},
    "pair, instruction": {"instruction": "Sum up.", "input": "A\nbook", "chosen": "Ok", "rejected": "No"},
    "pair, messages": {"prompt": TALK[:-1], "chosen": TALK[-1:], "rejected": [TALK[2]]},
    "pair, whole talks": {"chosen": TALK, "rejected": [*TALK[:-1], TALK[2]]},
}
KINDS = {
    "list.json": lambda rows: json.dumps(rows, indent=1).encode(),
    "lines.json": lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode(),
    "lines.jsonl": lambda rows: b"\xef\xbb\xbf" + "\r\n\r\n".join(map(json.dumps, rows)).encode(),
    "lines.ndjson.gz": lambda rows: gzip.compress("\n".join(map(json.dumps, rows)).encode()),
    "lines.jsonl.zst": lambda rows: pyarrow.compress(KINDS["lines.json"](rows), "zstd", asbytes=True),
    "list.json.zst": lambda rows: pyarrow.compress(json.dumps(rows).encode(), "zstd", asbytes=True),
    "rows.parquet": lambda rows: table(rows, "parquet"),
    "rows.arrow": lambda rows: table(rows, "file"),
    "stream.arrow": lambda rows: table(rows, "stream"),
    "-": lambda rows: KINDS["lines.json"](rows),
}


def table(rows, kind):
    import pyarrow.parquet

    sink, content = pyarrow.BufferOutputStream(), pyarrow.Table.from_pylist(rows)
    if kind == "parquet":
        pyarrow.parquet.write_table(content, sink)
    else:
        with getattr(pyarrow.ipc, f"new_{kind}")(sink, content.schema) as writer:
            writer.write_table(content)
    return sink.getvalue().to_pybytes()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Bytes, some special tokens, a token that begins every text, and a template with generation tags."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIAL])
    start = [("<s>", tokenizer.token_to_id("<s>"))]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=start
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tools = "{%- if tools %}{{- '<|im_start|>tools\n' + (tools | tojson) + '<|im_end|>\n' }}{%- endif %}\n"
    (folder / "chat_template.jinja").write_text(tools + TEMPLATE.read_text())
    return folder


def expected(shape, row, theirs):
    """Ids and targets by transformers."""
    end = theirs.eos_token_id
    if shape == "text":
        ids = theirs(row["text"]).input_ids
        return [*ids, end], [1] * (len(ids) + 1)
    if shape == "prompt, completion":
        prompt = theirs(row["prompt"]).input_ids
        answer = theirs(row["completion"], add_special_tokens=False).input_ids + [end]
        return prompt + answer, [0] * len(prompt) + [1] * len(answer)
    if shape.startswith("pair"):
        (chosen, scored), (rejected, scored_too) = (
            expected(*answer_of(row, name), theirs) for name in ("chosen", "rejected")
        )
        return chosen + rejected, [*scored, 0, *scored_too[1:]]
    messages = row.get("messages", TALK)
    if shape == "instruction":
        question = f"{row['instruction']}\n{row['input']}"
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": row["output"]}]
    found = theirs.apply_chat_template(
        messages,
        tools=TOOLS if "tools" in shape else None,
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    return found["input_ids"], found["assistant_masks"]


def answer_of(row, name):
    """The shape and the row of a question with one of its answers."""
    if "instruction" in row:
        return "instruction", row | {"output": row[name]}
    if isinstance(row[name], str):
        return "prompt, completion", row | {"completion": row[name]}
    return "messages", {"messages": row.get("prompt", []) + row[name]}


def test_every_shape_in_every_kind_of_file(model, tmp_path, monkeypatch):
    theirs = transformers.AutoTokenizer.from_pretrained(model)
    ours, template = load_tokenizer(model), load_chat_template(model)
    end, size = theirs.eos_token_id, ours.get_vocab_size()
    print(f"\n{'':20}" + "".join(f"{kind:>17}" for kind in KINDS))
    for shape, row in ROWS_OF.items():
        reading = Reading(pairs=shape.startswith("pair"))
        ids, targets = expected(shape, row, theirs)
        line = f"{shape:20}"
        for kind, write in KINDS.items():
            content = write([row, row])
            data_files._spool_standard_input.cache_clear()
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
            (tmp_path / kind).write_bytes(content)
            file = "-" if kind == "-" else tmp_path / kind
            sample, again = read_samples(
                [file], ours, eos_token_id=end, vocab_size=size, chat_template=template, reading=reading
            )
            assert sample.tokens.tolist() == again.tokens.tolist() == ids, (shape, kind)
            if sample.scored is not None:
                assert sample.scored.astype(int).tolist() == targets, (shape, kind)
            line += f"{f'{len(ids)} ids, {sum(targets)}':>17}"
        print(line)


def test_a_text_file(model, tmp_path):
    theirs = transformers.AutoTokenizer.from_pretrained(model)
    for name, start in (("a.txt", b""), ("b.py", b"\xef\xbb\xbf")):
        (tmp_path / name).write_bytes(start + ROWS_OF["text"]["text"].encode())
        (sample,) = read_samples(
            [tmp_path / name], load_tokenizer(model), eos_token_id=theirs.eos_token_id, vocab_size=300
        )
        assert sample.tokens.tolist() == expected("text", ROWS_OF["text"], theirs)[0]
