"""Export of a trained GPT-2 to a Hugging Face folder, for transformers and compatible tools."""

from __future__ import annotations

import filecmp
import itertools
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from picogpt.config import GPT2Config
from picogpt.data.bpe import END_OF_TEXT, GPT2Tokenizer, byte_characters
from picogpt.data.fetch import WEIGHTS_FILE
from picogpt.errors import PicogptError
from picogpt.files import write_text
from picogpt.models.gpt2 import GPT2
from picogpt.models.pretrained import TRANSPOSED

CARD = "README.md"


def export_folder(
    model: GPT2, tokenizer: GPT2Tokenizer, folder: Path, card: Callable[[str], str], name: str | None = None
) -> None:
    """Write a folder that transformers loads as a GPT2LMHeadModel with its tokenizer, atomically.

    `card` gives the text of its README.md for the name under which transformers finds the model: `name`, or else the
    folder's. A folder that has this model already is kept, and with it a README.md that its owner has edited.

    Raises PicogptError when there is another folder of this name, or it cannot be written.
    """
    state = {
        f"transformer.{name}": (tensor.T if name.endswith(TRANSPOSED) else tensor).float().contiguous().cpu()
        for name, tensor in model.state_dict().items()
    }
    texts = {CARD: card(name or str(folder)), **_texts(model.config, model.wte.num_embeddings, tokenizer)}
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        temporary.mkdir(parents=True)
        save_file(state, temporary / WEIGHTS_FILE, metadata={"format": "pt"})
        for file, text in texts.items():
            (temporary / file).write_text(text, encoding="utf-8")
        (temporary / WEIGHTS_FILE).chmod(
            (temporary / "config.json").stat().st_mode
        )  # safetensors lets the owner alone read
        if not folder.exists():
            os.replace(temporary, folder)
            return
        for file in (WEIGHTS_FILE, *texts):
            there = (folder / file).exists()
            if not there or (file != CARD and not filecmp.cmp(temporary / file, folder / file, shallow=False)):
                problem = f"has no {file}" if not there else f"has another {file}"
                raise PicogptError(f"{folder} exists already and {problem}: remove it, or choose another --out")
        if (folder / CARD).read_bytes() == card(str(folder)).encode():
            write_text(folder / CARD, texts[CARD])
    except (OSError, SafetensorError) as error:
        raise PicogptError(f"cannot export to {folder}: {getattr(error, 'strerror', None) or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _texts(config: GPT2Config, vocab_size: int, tokenizer: GPT2Tokenizer) -> dict[str, str]:
    """The text files of the folder by name."""
    model = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        **config.model_dump(include={"n_layer", "n_head", "n_embd"}),
        **dict.fromkeys(("n_positions", "n_ctx"), config.block_size),
        "vocab_size": vocab_size,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.dropout),
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        **dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.end_of_text),
        "torch_dtype": "float32",
    }
    generation = {  # what `picogpt sample` does by default; transformers would choose among 50 tokens only
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.end_of_text),
        "do_sample": True,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "max_new_tokens": min(
            500, config.block_size // 2
        ),  # leaves room for a prompt: transformers has no longer context
    }
    words = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": config.block_size,
        "add_prefix_space": False,
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), END_OF_TEXT),
    }
    vocabulary = {_written(token): rank for token, rank in tokenizer.ranks.items()}
    vocabulary[END_OF_TEXT] = len(tokenizer.ranks)
    return {
        "config.json": json.dumps(model, indent=2) + "\n",
        "generation_config.json": json.dumps(generation, indent=2) + "\n",
        "tokenizer_config.json": json.dumps(words, indent=2) + "\n",
        "vocab.json": json.dumps(vocabulary, ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges(tokenizer)),
    }


def merges(tokenizer: GPT2Tokenizer) -> list[tuple[str, str]]:
    """The pair of tokens of each merge, in order, in the notation of OpenAI's files."""
    pairs = []
    for token, rank in tokenizer.ranks.items():
        if rank < 256:
            continue
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:  # what came before this merge has joined all but the last two parts
            ranks = [tokenizer.ranks.get(a + b, rank) for a, b in itertools.pairwise(parts)]
            first = ranks.index(min(ranks))
            parts[first : first + 2] = [parts[first] + parts[first + 1]]
        pairs.append((_written(parts[0]), _written(parts[1])))
    return pairs


def _written(token: bytes) -> str:
    characters = byte_characters()
    return "".join(characters[byte] for byte in token)
