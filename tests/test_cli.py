"""The command line: each command does its work, and bad input gives one line and exit code 2."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jsparse
from jsparse.__main__ import main
from jsparse.models import Llama, byte_tokenizer, shipped_model
from jsparse.serve import CacheConfig, generate
from jsparse.train import evaluate_perplexity

TEXT = "def main():\n    return 0\n" * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory, save_tiny_model):
    """A folder with a tiny byte-level checkpoint in ``model``, a text file and a head pattern."""
    folder = tmp_path_factory.mktemp("cli")
    save_tiny_model(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    (folder / "latin1.txt").write_bytes(b"caf\xe9")
    (folder / "empty.txt").write_text("")
    (folder / "bad.yaml").write_text("learning_rat: 1")
    jsparse.HeadPattern([[0.1, 0.9], [0.9, 0.1]]).save(folder / "pattern.tsv")
    return folder


def run(folder, capfd, *arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of ``jsparse <arguments>``, with {} standing for the folder."""
    code = main([argument.replace("{}", str(folder)) for argument in arguments])
    out, err = capfd.readouterr()
    return code, out, err


def test_generate_prints_what_generate_gives(folder, capfd):
    model, tokenizer = Llama.from_pretrained(folder / "model"), byte_tokenizer()
    ids = generate(model, [tokenizer.encode("def main").ids], 12, cache=CacheConfig(budget=None)).tokens[0]
    code, out, err = run(
        folder, capfd, "generate", "--model", "{}/model", "--prompt", "def main", "--max-new-tokens", "12"
    )
    assert code == 0
    assert out.rstrip("\n") == tokenizer.decode(ids).rstrip("\ufffd\n")
    assert "prompt of 8 tokens" in err and "12 tokens" in err and "tokens/s" in err


def test_generate_needs_no_model(folder, capfd):
    code, out, err = run(folder, capfd, "generate", "--prompt", "import os", "--max-new-tokens", "4")
    assert code == 0 and out and "4 tokens" in err
    code, same, _ = run(
        folder,
        capfd,
        *("generate", "--model", str(shipped_model()), "--prompt", "import os", "--max-new-tokens", "4"),
    )
    assert code == 0 and same == out


def test_generate_takes_a_prompt_file_and_a_sparse_cache(folder, capfd):
    (folder / "prompt.txt").write_text(TEXT[:40])
    options = (
        "--budget 16 --page-size 16 --pattern {}/pattern.tsv --sink 4 --window 8 --prefill-window 12 "
        "--kv-bits 4 --temperature 0.8 --top-k 5"
    )
    command = ["generate", "--model", "{}/model", "--prompt-file", "{}/prompt.txt", "--max-new-tokens", "8"]
    dense = run(folder, capfd, *command)
    sparse = run(folder, capfd, *command, *options.split())
    assert dense[0] == sparse[0] == 0
    assert "prompt of 40 tokens" in sparse[2]
    assert dense[1] != sparse[1]


def test_evaluate_prints_and_writes_perplexity(folder, capfd):
    code, out, _ = run(
        folder,
        capfd,
        *("evaluate", "--model", "{}/model", "--data", "{}/text.txt", "{}/text.txt"),
        *("--contexts", "16", "32", "--max-windows", "3", "--json", "{}/perplexity.json"),
    )
    assert code == 0
    written = json.loads((folder / "perplexity.json").read_text())
    tokens = np.array(byte_tokenizer().encode(TEXT * 2).ids)
    for result, context in zip(written, (16, 32), strict=True):
        expected = evaluate_perplexity(
            Llama.from_pretrained(folder / "model"), tokens, context=context, max_windows=3
        )
        assert result["context"] == context and result["tokens"] == expected.tokens
        assert result["perplexity"] == pytest.approx(expected.perplexity)
        assert f"{expected.perplexity:.4f}" in out


def test_shifted_attention_is_another_pattern(folder, capfd):
    command = ["evaluate", "--model", "{}/model", "--data", "{}/text.txt", "--contexts", "32"]
    full, shifted = run(folder, capfd, *command), run(folder, capfd, *command, "--attention", "shifted")
    assert full[0] == shifted[0] == 0
    assert full[1].splitlines()[-2] != shifted[1].splitlines()[-2]


def test_finetune_writes_a_model_with_a_longer_context(folder, capfd):
    code, out, _ = run(
        folder,
        capfd,
        *(
            "finetune",
            "--model",
            "{}/model",
            "--data",
            "{}/text.txt",
            "--output",
            "{}/longer",
            "--context",
            "128",
        ),
        *("--steps", "2", "--batch-size", "1", "--lora-rank", "2", "--learning-rate", "1e-3"),
    )
    assert code == 0 and "2 steps" in out
    assert Llama.from_pretrained(folder / "longer").config.max_position_embeddings == 128


GENERATE = "generate --model {}/model"
EVALUATE = "evaluate --model {}/model --data {}/text.txt --contexts 32"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("polish", "unknown command 'polish'; commands are pretrain, finetune, merge, evaluate, heads"),
        (GENERATE + " --prompt a --budget 100", "budget=100 must be a multiple of page_size=64"),
        (GENERATE + " --prompt a --temperature -1", "temperature must be"),
        (GENERATE + " --prompt a --pattern {}/text.txt", "line 1"),
        (GENERATE + " --prompt a --max-new-tokens 100", "max_position_embeddings=64"),
        (GENERATE + " --prompt-file {}/latin1.txt", "latin1.txt is not UTF-8"),
        (GENERATE + " --prompt-file {}/empty.txt", "is empty"),
        ("generate --model {}/nothing --prompt a", "nothing"),
        ("evaluate --model {}/nothing --data {}/text.txt", "nothing"),
        ("evaluate --model {}/model --data {}/nothing.txt", "nothing.txt does not exist"),
        ("evaluate --model {}/model --data {}/latin1.txt", "latin1.txt is not UTF-8"),
        (EVALUATE + " --json {}/no/such.json", "no/such.json does not exist"),
        ("evaluate --model {}/model --data {}/text.txt --contexts 1", "context must be at least 2, not 1"),
        ("finetune --config {}/no.yaml", "no.yaml does not exist; it must be a YAML file of options"),
        ("finetune --model m --config", "--config needs a value, the name of a YAML file of options"),
        ("finetune --config {}/bad.yaml", "unknown option learning_rat; the nearest is learning_rate"),
        ("plan finetune --config {}/bad.yaml", "unknown option learning_rat; the nearest is learning_rate"),
    ],
)
def test_bad_input_is_one_line(folder, capfd, command, message):
    before = sorted(folder.rglob("*"))
    code, out, err = run(folder, capfd, *command.split())
    assert code == 2 and out == ""
    assert err.startswith("jsparse: error: ") and err.count("\n") == 1
    assert message in err
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (GENERATE + " --modle b --prompt a", "--modle"),
        (GENERATE, "exactly one of --prompt and --prompt-file"),
        (GENERATE + " --prompt a --prompt-file b", "exactly one of --prompt and --prompt-file"),
        (GENERATE + " --prompt a --window 8", "--window is for streaming heads: give a --pattern"),
        (GENERATE + " --prompt a --sparsity 0.5", "--sparsity says how many heads of a --pattern stream"),
        (GENERATE + " --prompt a --policy random", "--policy random chooses what is read within a --budget"),
        (GENERATE + " --prompt a --policy dense --budget 64", "--policy dense chooses no pages"),
        (GENERATE + " --prompt a --policy streaming --budget 64", "--policy streaming chooses no pages"),
        (GENERATE + " --prompt a --policy dense --pattern p", "--policy dense does not ask which heads"),
        (GENERATE + " --prompt a --top-k many", "--top-k"),
        (
            "finetune --model {}/model --data {}/text.txt --output {}/other --context 100 --group-size 30",
            "group_size=30 does not fit context=100",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(folder, capfd, command, message):
    before = sorted(folder.rglob("*"))
    with pytest.raises(SystemExit) as exit:
        main(command.replace("{}", str(folder)).split())
    out, err = capfd.readouterr()
    assert exit.value.code == 2 and out == ""
    assert message in err and err.startswith("jsparse: error: ") and err.count("\n") == 1
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("command", ["finetune", "generate", "evaluate", "demo"])
def test_every_command_describes_its_options(command, capfd):
    with pytest.raises(SystemExit) as exit:
        main([command, "--help"])
    out = capfd.readouterr().out
    assert exit.value.code == 0 and f"usage: jsparse {command}" in out and ">>>" not in out


def test_help_lists_the_commands(capfd):
    assert main([]) == main(["--help"]) == 0
    out = capfd.readouterr().out
    assert all(out.count(f"\n  {command} ") == 2 for command in ("finetune", "generate", "evaluate", "demo"))


def test_it_runs_as_a_module_without_a_warning():
    command = [sys.executable, "-W", "error", "-m", "jsparse", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"jsparse {importlib.metadata.version('jsparse')}\n" and done.stderr == ""


def test_heads_learns_a_pattern_that_generate_takes(folder, capfd):
    save_longer_model(folder / "model", folder / "256")
    (folder / "haystack.txt").write_text(TEXT)
    settings = "--context 128 --min-context 100 --needles 1 --words 1 --sink 2 --window 8 --steps 2"
    command = ("heads --model {}/256 --data {}/haystack.txt --output {}/learned " + settings).split()
    code, out, err = run(folder, capfd, *command)
    assert code == 0, err
    scores = jsparse.HeadPattern.load(folder / "learned" / "full_attention_heads.tsv")
    for layer, streams in enumerate(scores.threshold(0.5)):
        assert f"layer {layer}: {streams.sum()} of 2 KV heads stream" in out

    shown = out.splitlines()[-1].split()  # the line on how to use it, which is a command
    assert shown[:2] == ["jsparse", "generate"] and "--pattern" in shown
    words = shown[1 : shown.index("--prompt")]
    assert run(folder, capfd, *words, "--prompt", "def", "--max-new-tokens", "3")[0] == 0

    code, _, err = run(folder, capfd, *command)
    assert code == 2 and "has files (config.json, full_attention_heads.tsv, losses.tsv)" in err
    assert run(folder, capfd, "--help")[1].count("\n  heads ") == 1


def save_longer_model(model, folder):
    """A copy of the tiny checkpoint for 256 positions: a passkey takes more than its 64."""
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    fields = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 256}
    (folder / "config.json").write_text(json.dumps(fields))


@pytest.mark.slow
def test_bench_measures_decoding_and_prompts(folder, capfd):
    save_longer_model(folder / "model", folder / "bench")
    settings = "--model {}/bench --contexts 70 --sink 2 --window 8 --repeats 1"
    decode = f"bench decode {settings} --output {{}}/decode --policies dense lserve --budget 64 --steps 2"
    code, out, err = run(folder, capfd, *decode.split())
    assert code == 0, err
    assert "int4 pages" in out and "of dense" in out and "read per step" in out and "/decode" in out
    rows = json.loads((folder / "decode" / "results.json").read_text())["rows"]
    assert [(row["context"], row["policy"]) for row in rows] == [(70, "dense"), (70, "lserve")]
    assert (folder / "decode" / "decode.png").is_file()

    prefill = f"bench prefill {settings} --output {{}}/prefill --variants streaming"
    code, out, err = run(folder, capfd, *prefill.split())
    assert code == 0, err
    assert "tokens/s" in out and (folder / "prefill" / "results.json").is_file()

    code, out, _ = run(folder, capfd, "bench")
    assert code == 0 and out == run(folder, capfd, "bench", "--help")[1] and "\n  prefill " in out
    code, out, err = run(folder, capfd, *decode.split())
    assert code == 2 and out == "" and "has files (decode.png, results.json)" in err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("bench decode", "--output"),
        ("bench decode --output {}/new --policies lru", "lru"),
        ("bench decode --output {}/new --budget 100", "budget=100 must be a multiple of page_size=64"),
        ("bench decode --output {}/new --kv-bits 3", "--kv-bits"),
        ("bench prefill --output {}/new --variants sparse", "sparse"),
        ("bench prefill --output {}/new --contexts 0", "contexts must be integers >= 1, not 0"),
    ],
)
def test_bench_refuses_options_that_do_not_fit(folder, capfd, command, message):
    test_options_that_do_not_fit_are_refused(folder, capfd, command, message)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("bench training", "unknown command 'bench training'; commands are decode, prefill"),
        ("bench decode --model {}/nothing --output {}/new", "nothing does not exist"),
        ("bench prefill --model {}/model --output {}/new --contexts 64", "max_position_embeddings=64"),
        ("bench decode --model {}/model --output {}/text.txt --contexts 8", "text.txt is a file"),
    ],
)
def test_bench_refuses_what_it_cannot_measure(folder, capfd, command, message):
    test_bad_input_is_one_line(folder, capfd, command, message)


@pytest.mark.parametrize(("number", "name"), [(15, "SIGTERM"), (2, "Ctrl-C")])
def test_a_run_that_was_stopped_has_an_exit_code_of_its_own(tmp_path, monkeypatch, capsys, number, name):
    from jsparse.train import FinetuneResult

    def stopped(config):
        return FinetuneResult(config.output_folder, (3.0, 2.5), {}, finished=False, stopped_by=number)

    monkeypatch.setattr("jsparse.train.finetuning.finetune", stopped)
    options = ["--model", "base", "--data", "a.txt", "--output", str(tmp_path), "--context", "64"]
    assert main(["finetune", *options]) == 128 + number
    assert f"stopped by {name} after step 2, last loss 2.5000" in capsys.readouterr().err


def test_a_finished_run_names_its_best_step_and_the_step_of_its_model(tmp_path, monkeypatch, capsys):
    from jsparse.train import FinetuneResult

    def finished(config):
        best = {"best_step": 1, "best_loss": 2.25, "exported_step": 1}
        assert config.eval_files == (Path("held.txt"),) and config.patience == 1
        return FinetuneResult(config.output_folder, (3.0, 2.5), {}, **best)

    monkeypatch.setattr("jsparse.train.finetuning.finetune", finished)
    options = ["--model", "base", "--data", "a.txt", "--output", str(tmp_path), "--context", "64"]
    assert main(["finetune", *options, "--eval-data", "held.txt", "--patience", "1", "--epochs", "2"]) == 0
    assert capsys.readouterr().out == (
        f"{tmp_path}: trained for 2 steps, last loss 2.5000, lowest held-out loss 2.2500 after step 1; "
        "the model is that of step 1\n"
    )


def test_processes_are_named_in_full(capsys):
    options = ["--model", "base", "--data", "a.txt", "--output", "o", "--context", "64", "--processes", "2"]
    assert main(["finetune", *options]) == 2
    assert "--coordinator, --processes and --process must be given together" in capsys.readouterr().err


def test_a_plan_names_what_it_can_plan(capsys):
    assert main(["plan", "--help"]) == 0 and "gpu-compile" in capsys.readouterr().out
    assert main(["plan", "training"]) == 2
    assert "unknown command 'plan training'; commands are finetune, generate" in capsys.readouterr().err


@pytest.mark.parametrize("options", [["generate"], ["finetune"]])
def test_a_plan_that_does_not_compile_is_one_line(options, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise RuntimeError("too many\nregisters")

    for make_plan in ("jsparse.serve.plan.plan_generate", "jsparse.train.plan.plan_finetune"):
        monkeypatch.setattr(make_plan, fail)
    monkeypatch.setattr("jsparse.plan.compile_only.prepare_process", lambda: None)
    model = ["--model", str(shipped_model())]
    given = {"generate": ["--prompt-tokens", "64"], "finetune": ["--context", "64"]}[options[0]]
    assert main(["plan", *options, *model, *given]) == 2
    expected = "jsparse: error: the program does not compile, and nothing is estimated: too many registers\n"
    assert capsys.readouterr().err == expected


def test_a_package_that_is_not_installed_is_one_line(folder, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    settings = "--context 64 --steps 1 --batch-size 1 --base-bits 8"
    command = "finetune --model {}/model --data {}/text.txt --output {}/coded " + settings
    code, out, err = run(folder, capfd, *command.split())
    assert code == 2 and out == "" and err.startswith("jsparse: error: ") and err.count("\n") == 1
    assert "needs qwix, which is not installed: in a clone of jsparse, pip install -e '.[qlora]'" in err
    assert not (folder / "coded" / "config.json").exists()


def test_the_scoreboard_has_two_names(capfd):
    for command in (["scoreboard"], ["evaluate", "scoreboard"]):
        with pytest.raises(SystemExit) as exit:
            main([*command, "--help"])
        assert exit.value.code == 0 and "usage: jsparse evaluate scoreboard" in capfd.readouterr().out


@pytest.mark.parametrize("name", ["plan", "bench"])
def test_a_name_of_several_commands_lists_them(name, capfd):
    assert main([name]) == main([name, "--help"]) == 0
    out = capfd.readouterr().out
    assert out.count(f"usage: jsparse {name} COMMAND") == 2 and max(map(len, out.splitlines())) <= 100
