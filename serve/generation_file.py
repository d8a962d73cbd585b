"""The sampling that a checkpoint's ``generation_config.json`` asks for."""

from pathlib import Path
from typing import Any, NamedTuple

from jsparse.hub import model_folder
from jsparse.models.safetensors_folder import read_json
from jsparse.serve.sampling import SamplingParams

# Fields of the file, and those of SamplingParams; the second are for sampling alone.
_ALWAYS = {
    "repetition_penalty": "repetition_penalty",
    "min_new_tokens": "min_tokens",
    "stop_strings": "stop",
}
_DRAWN = {"temperature": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}
# Fields that change the text and that nothing here does, with the values that change nothing.
_NOT_DONE: dict[str, tuple] = {
    "bad_words_ids": ([],),
    "begin_suppress_tokens": ([],),
    "constraints": ([],),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_decoder_ids": ([],),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "max_time": (),
    "min_length": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "remove_invalid_values": (False,),
    "sequence_bias": ({}, []),
    "suppress_tokens": ([],),
    "token_healing": (False,),
    "watermarking_config": (),
}
_NOT_DRAWN: dict[str, tuple] = {"epsilon_cutoff": (0,), "eta_cutoff": (0,), "top_h": (), "typical_p": (1,)}


class GenerationDefaults(NamedTuple):
    """What a checkpoint wants where its user says nothing.

    - sampling: the parameters.
    - max_new_tokens: None if the file has none.
    - notes: one sentence for each setting of the file that changes the text and is not done here.
    """

    sampling: SamplingParams
    max_new_tokens: int | None
    notes: tuple[str, ...]


def generation_defaults(folder: str | Path) -> GenerationDefaults:
    """The sampling that ``generation_config.json`` in a Hugging Face folder asks for.

    Without ``do_sample: true`` it is greedy, as in transformers. With it, ``temperature`` is 1 unless given,
    and, as in vLLM, ``top_k``, ``top_p`` and ``min_p`` restrict nothing unless given (transformers itself
    would take 50 for ``top_k``). ``repetition_penalty``, ``min_new_tokens`` and ``stop_strings`` count either
    way. Stop tokens are read with the model's config, and ``max_length`` gives way to the number of new
    tokens.

    - folder: a folder, or an id on the hub; without a ``generation_config.json`` in it, they are greedy.

    Returns the parameters, the number of new tokens, and what of the file cannot be followed.

    Raises ValueError, naming the file, if it is not JSON or a value is out of range.

    >>> import json, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder, "generation_config.json")
    ...     _ = file.write_text(json.dumps({"do_sample": True, "top_p": 0.9, "num_beams": 4}))
    ...     defaults = generation_defaults(folder)
    >>> defaults.sampling.temperature, defaults.sampling.top_p, defaults.notes
    (1.0, 0.9, ('num_beams=4 of generation_config.json is not followed',))
    """
    file = model_folder(folder) / "generation_config.json"
    if not file.is_file():
        return GenerationDefaults(SamplingParams(), None, ())
    given = {name: value for name, value in read_json(file).items() if value is not None}
    drawn = given.get("do_sample", False)
    if not isinstance(drawn, bool):
        raise ValueError(f"{file}: do_sample must be true or false, not {drawn!r}")
    taken = _ALWAYS | (_DRAWN if drawn else {})
    fields: dict[str, Any] = {"temperature": 1.0} if drawn else {}
    fields |= {ours: given[theirs] for theirs, ours in taken.items() if theirs in given}
    most = given.get("max_new_tokens")
    if most is not None and (not isinstance(most, int) or isinstance(most, bool) or most < 1):
        raise ValueError(f"{file}: max_new_tokens must be an integer >= 1, not {most!r}")
    try:
        sampling = SamplingParams(**fields)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    notes = tuple(
        f"{name}={given[name]!r} of generation_config.json is not followed"
        for name, harmless in (_NOT_DONE | (_NOT_DRAWN if drawn else {})).items()
        if name in given and given[name] not in harmless
    )
    return GenerationDefaults(sampling, most, notes)
