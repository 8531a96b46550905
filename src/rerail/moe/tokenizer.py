"""The tokenizer that a checkpoint's own files describe.

The Auto classes of transformers rebuild some tokenizers by the recipe of their class and so leave
out the normaliser and the pre-tokenizer of `tokenizer.json`. The model was trained on the ids of
its file, so the file decides.
"""

import functools
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import TokenizersBackend

from rerail.errors import InputError

FILE = "tokenizer.json"
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")
_ADDED = 64  # added tokens that are looked at
# what recipes differ in: digits, case, contractions, runs of blanks, scripts, composed accents
_PROBES = (
    "In 2023 the 650841823 words; x=12345 end, 3.14159e-10 and 1,000,000.",
    "We'll say THEY'LL, don't, I'M and it's; snake_case, camelCase, kebab-case.",
    "  two blanks,   three,\ttab,\n\n\nthree lines\r\n    indented = code[0]  # end  \n ",
    "Caf\u00e9 cafe\u0301, na\u00efve, \ufb01ne \u2460, \u00bd and \u2122; \uff21\uff22\uff23.",
    "\u4e2d\u6587\u5b57\u7b26 \u65e5\u672c\u8a9e\u30c6\u30b9\u30c8 \ud55c\uad6d\uc5b4 "
    "\u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0627\u0644\u0639\u0631\u0628\u064a\u0629 "
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22",
    "emoji \U0001f642\U0001f469\u200d\U0001f4bb, zero\u200bwidth, hard\u00a0blank, (){}[]<>!?...",
    "https://example.org/a_b?c=1&d=%20 $x^2$ \\alpha <b>bold</b> @name #tag",
    "x",
)


def true_to_file(tokenizer: Any, path: Path, name: str) -> Any:
    """Return a tokenizer that gives the ids of a `tokenizer.json`: this one, or one built from it.

    Args:
        tokenizer: as the Auto class made it.
        path: of the file.
        name: of the model, for the error.

    Raises:
        InputError: the file cannot be read, or no tokenizer of transformers gives its ids.
    """
    file = _of_file(path, path.stat().st_mtime_ns)
    alike = _parts(getattr(tokenizer, "backend_tokenizer", None)) == _parts(file)
    if alike and _differing(tokenizer, file) is None:
        return tokenizer
    roles = {role: getattr(tokenizer, role) for role in _ROLES}
    plain = TokenizersBackend.from_pretrained(path.parent)
    for role, token in roles.items():
        known = token is not None and file.token_to_id(str(token)) is not None
        if known and getattr(plain, role) is None:
            setattr(plain, role, token)
    if (probe := _differing(plain, file)) is not None:
        raise InputError(
            f"the tokenizer of model {name!r} gives other ids than its {FILE} for {probe!r}, and "
            f"the model was trained on those of the file; make tokenizer_config.json agree with it"
        )
    return plain


@functools.lru_cache(maxsize=2)
def _of_file(path: Path, _: int) -> Tokenizer:
    try:
        file = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing more special
        raise InputError(
            f"{path} cannot be read ({str(error).splitlines()[0]}); fetch it again"
        ) from error
    file.no_truncation()
    file.no_padding()
    return file


def _parts(backend: Tokenizer | None) -> Any:
    """Return the states of the parts that decide where a text is cut, None where there is none."""
    if backend is None:
        return None
    parts = (backend.normalizer, backend.pre_tokenizer)
    return [None if part is None else part.__getstate__() for part in parts]


def _differing(tokenizer: Any, file: Tokenizer) -> str | None:
    """Return the first probe whose ids are not those of the file."""
    added = sorted(file.get_added_tokens_decoder().items())[:_ADDED]
    for probe in (*_PROBES, "a".join(token.content for _, token in added)):
        try:
            ids = tokenizer(probe, add_special_tokens=False, verbose=False)["input_ids"]
        except Exception:  # the library raises nothing more special, for an unknown token say
            return probe
        if ids != file.encode(probe, add_special_tokens=False).ids:
            return probe
    return None
