"""``jsparse evaluate``: how windows are scored, the pattern of the training, passkeys, figures."""

import json

import numpy as np
import pytest

from jsparse.__main__ import main
from jsparse.models import Llama, byte_tokenizer, load_config, load_tokenizer, shipped_model
from jsparse.models.patterns import save_pattern, shifted_pattern
from jsparse.texts.corpus import standard_library_files
from jsparse.train import evaluate_perplexity, read_documents, shifted_head_masks

TEXT = "def main():\n    return 0\n" * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory, save_tiny_model):
    """A folder with a tiny checkpoint in ``model``, the same with groups of 16 in ``trained``, and a text."""
    folder = tmp_path_factory.mktemp("evaluate")
    for name in ("model", "trained"):
        save_tiny_model(folder / name)
    save_pattern(shifted_pattern(load_config(folder / "trained"), 16), folder / "trained")
    (folder / "text.txt").write_text(TEXT)
    return folder


def run(folder, capfd, options: str) -> tuple[int, str, str]:
    code = main(["evaluate", *options.replace("{}", str(folder)).split()])
    out, err = capfd.readouterr()
    return code, out, err


def test_scoring_and_the_pattern_of_the_training(folder, capfd):
    options = "--data {}/text.txt --contexts 32 --scoring last --last 8 --max-windows 4 --json {}/out.json"
    results = []
    for where in ("--model {}/model", "--model {}/trained --attention trained"):
        assert run(folder, capfd, f"{where} {options}")[0] == 0
        results += json.loads((folder / "out.json").read_text())
    model, tokens = Llama.from_pretrained(folder / "model"), np.array(byte_tokenizer().encode(TEXT).ids)
    for result, mask in zip(results, (None, shifted_head_masks(4, 16)), strict=True):
        expected = evaluate_perplexity(
            model, tokens, context=32, scoring="last", last=8, max_windows=4, mask=mask
        )
        assert (result["tokens"], result["stride"], result["last"]) == (32, 8, 8)
        assert result["perplexity"] == pytest.approx(expected.perplexity)
    assert results[0]["perplexity"] != pytest.approx(results[1]["perplexity"], rel=1e-3)


def test_nothing_given_is_the_shipped_model_on_the_standard_library(folder, capfd):
    code, out, err = run(folder, capfd, "--contexts 16 --json {}/shipped.json")
    assert code == 0, err
    _, files = standard_library_files()
    assert f"data: {len(files)} held-out modules" in out and "at most 64 windows" in out
    (result,) = json.loads((folder / "shipped.json").read_text())
    model, tokenizer = Llama.from_pretrained(shipped_model()), load_tokenizer(shipped_model())
    documents = read_documents(
        files, tokenizer, eos_token_id=model.config.end_token, vocab_size=model.config.vocab_size
    )
    expected = evaluate_perplexity(model, np.concatenate(documents), context=16, max_windows=64)
    assert result["tokens"] == expected.tokens == 15 + 63 * 8
    assert result["perplexity"] == pytest.approx(expected.perplexity)


def test_passkeys_alone_with_a_figure(folder, capfd):
    code, out, _ = run(
        folder,
        capfd,
        "--model {}/model --passkeys --lengths 256 --depths 0 1 --samples 2 --batch-size 4 "
        "--plot {}/passkeys.png --json {}/passkeys.json",
    )
    assert code == 0 and out.count(" of 2 ") == 2
    assert (folder / "passkeys.png").read_bytes().startswith(b"\x89PNG")
    rows = json.loads((folder / "passkeys.json").read_text())
    assert [(row["length"], row["depth"], row["samples"]) for row in rows] == [(256, 0.0, 2), (256, 1.0, 2)]
    assert all(row["accuracy"] == row["correct"] / 2 for row in rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model {}/model --data {}/text.txt --attention trained", "attention_pattern.json does not exist"),
        (
            "--model {}/trained --data {}/text.txt --attention trained --contexts 32 40",
            "length=40 is not a multiple of the shifted pattern's group_size=16; choose one that is, such as",
        ),
        ("--model {}/model --data {}/text.txt --attention shifted --contexts 34", "group_size=8; choose"),
        ("--model {}/model --data {}/text.txt --plot {}/figure.txt", "figure.txt must end in one of"),
        ("--model {}/model --data {}/text.txt --plot {}/no/figure.png", "no/figure.png does not exist"),
        ("--model {}/model --data {}/text.txt --contexts 32 --scoring last", "last=None must be given"),
        ("--model {}/model --passkeys --lengths 64", "lengths: 64 is too short"),
    ],
)
def test_bad_input_is_one_line(folder, capfd, options, message):
    before = sorted(folder.rglob("*"))
    code, out, err = run(folder, capfd, options)
    assert code == 2 and out == ""
    assert err.startswith("jsparse: error: ") and err.count("\n") == 1 and message in err
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model m --passkeys --stride 8", "--stride, --last and --max-windows are for perplexity"),
        ("--model m --data t --depths 0.5", "--depths is for passkeys: give --passkeys"),
        ("--model m --data t --attention learned", "--attention"),
    ],
)
def test_options_that_do_not_fit_are_refused(folder, capfd, options, message):
    with pytest.raises(SystemExit) as exit:
        run(folder, capfd, options)
    out, err = capfd.readouterr()
    assert exit.value.code == 2 and out == ""
    assert message in err and err.startswith("jsparse: error: ") and err.count("\n") == 1
