"""OpenAI's weights, from the Hugging Face hub.

Files on the hub are safetensors: plain numbers behind a header, nothing that could be run. OpenAI's linear layers
are stored as (in, out), ours as (out, in); everything else is the same.
"""

from __future__ import annotations

import errno
import functools
import os
import re
from pathlib import Path

import torch
from pydantic import Field

from picogpt.config import GPT2Config, Settings, config_folder, parse, read_yaml
from picogpt.errors import PicogptError, Unreachable, UsageError, innermost
from picogpt.files import sha256_file
from picogpt.models.gpt2 import GPT2
from picogpt.models.language_model import check_tensors, shapes_only

FILE = "model.safetensors"
VOCAB_SIZE = 50257
HUB_TIMEOUT_S = 3
BUSY = (408, 429)
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
TURNED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
MASKS = (".attn.bias", ".attn.masked_bias")
"""In older files, constants of the causal mask."""


class Pretrained(Settings):
    """A checkpoint of OpenAI's on the hub."""

    repository: str
    revision: str = Field(pattern=r"^[0-9a-f]{40}$")
    sha256: str | None = Field(pattern=r"^[0-9a-f]{64}$")
    parameters: str
    n_layer: int
    n_head: int
    n_embd: int

    def config(self) -> GPT2Config:
        """The model it is for."""
        return GPT2Config(kind="gpt2", n_layer=self.n_layer, n_head=self.n_head, n_embd=self.n_embd)


@functools.cache
def registry() -> dict[str, Pretrained]:
    """All of them by name: pretrained, pretrained-medium, pretrained-large, pretrained-xl."""
    path = config_folder() / "pretrained.yaml"
    return {name: parse(Pretrained, tree, f"{path}, {name}") for name, tree in read_yaml(path).items()}


def fetch(name: str, cached_only: bool = False) -> Path:
    """The safetensors file of `name` in the hub client's own cache; fetched, resumed and verified where need be.

    With `cached_only` nobody is asked for it.

    Raises Unreachable when the hub does not answer, PicogptError when it refuses, or serves another file.
    """
    from huggingface_hub import constants, errors, hf_hub_download

    endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT)
    asset = registry()[name]
    where = f"{asset.repository}/{FILE} at {asset.revision[:12]}"
    try:
        path = Path(
            hf_hub_download(
                asset.repository, FILE, revision=asset.revision, endpoint=endpoint, local_files_only=cached_only
            )
        )
    except (errors.HfHubHTTPError, errors.EntryNotFoundError) as error:
        status = _status(error)
        if status is None:
            raise Unreachable(
                f"cannot get {where}: the hub ({endpoint}) cannot be reached and the file is not in"
                f" its cache ({constants.HF_HUB_CACHE}). Run picogpt fetch {name} where it can, or set"
                f" HF_ENDPOINT to a mirror. [{innermost(error)}]"
            ) from error
        hints = {
            401: " It wants a login: hf auth login, or HF_TOKEN.",
            403: " This login may not read it.",
            404: " This hub does not have it: is HF_ENDPOINT right?",
        }
        message = f"the hub ({endpoint}) answers {status} to {where}.{hints.get(status, '')}"
        raise (Unreachable if status >= 500 or status in BUSY else PicogptError)(message) from error
    except OSError as error:  # the connection broke for good, or the disk is full; httpx errors come as OSError too
        if error.errno in DISK:
            raise PicogptError(f"cannot write {where} into the cache: {error.strerror}") from error
        raise Unreachable(f"cannot get {where}: {innermost(error)}; the next run goes on from what is kept") from error
    except Exception as error:  # the client's transport has errors of its own
        if type(error).__module__.partition(".")[0] not in ("httpx", "httpcore", "requests", "urllib3"):
            raise
        raise Unreachable(f"cannot get {where}: {innermost(error)}; the next run goes on from what is kept") from error
    _verify(path, asset.sha256 or _named_hash(path, asset, endpoint))
    return path


def is_here(name: str) -> bool:
    """Whether the file is in the cache of the hub's client."""
    from huggingface_hub import try_to_load_from_cache

    asset = registry()[name]
    return isinstance(try_to_load_from_cache(asset.repository, FILE, revision=asset.revision), str)


def hub_answers() -> bool:
    """Whether anybody answers at the address of the hub, whatever the answer."""
    import requests
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        requests.head(os.environ.get("HF_ENDPOINT", constants.ENDPOINT), timeout=HUB_TIMEOUT_S)
    except requests.RequestException:
        return False
    return True


def _status(error: BaseException | None) -> int | None:
    """The HTTP status in an error of the client or in what caused it; None where there was no answer."""
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None and status >= 400:
            return status
        error = error.__cause__ or error.__context__
    return None


def _named_hash(path: Path, asset: Pretrained, endpoint: str) -> str:
    """The hash that the hub names for the file: the cache calls the file by it, where the file system has links."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    if re.fullmatch(r"[0-9a-f]{64}", path.resolve().name):
        return path.resolve().name
    url = hf_hub_url(asset.repository, FILE, revision=asset.revision, endpoint=endpoint)
    return str(get_hf_file_metadata(url).etag)


def _verify(path: Path, expected: str) -> None:
    """Raises PicogptError, and drops the file, when it has another hash than the expected one."""
    blob = path.resolve()
    actual = sha256_file(blob)
    if actual != expected:
        blob.unlink(missing_ok=True)
        path.unlink(missing_ok=True)
        raise PicogptError(
            f"the hub serves another file than {FILE} at the pinned revision: sha256 {actual}, expected {expected}."
            " Nothing was kept."
        )


def load(name: str, cached_only: bool = False) -> GPT2:
    """The pretrained model `name`, on the CPU, in evaluation mode; fetched first where need be. Raises as `fetch`."""
    return load_safetensors(fetch(name, cached_only), registry()[name].config(), VOCAB_SIZE)


def load_for(config: GPT2Config, vocab_size: int) -> GPT2:
    """The pretrained model of the shape of `config`, with its dropout, to be trained on.

    Raises UsageError when OpenAI published none of that shape; and as `fetch`.
    """
    for name, asset in registry().items():
        if asset.config() == config.model_copy(update={"dropout": 0.0}) and vocab_size == VOCAB_SIZE:
            model = load_safetensors(fetch(name), config, vocab_size)
            model.train()
            return model
    sizes = "; ".join(f"{a.parameters}: {a.n_layer}, {a.n_head}, {a.n_embd}" for a in registry().values())
    raise UsageError(
        f"no pretrained weights fit n_layer={config.n_layer}, n_head={config.n_head}, n_embd={config.n_embd},"
        f" block_size={config.block_size} with {vocab_size:,} tokens; there are, with 1,024 and 50,257: {sizes}"
    )


def load_safetensors(path: Path, config: GPT2Config, vocab_size: int) -> GPT2:
    """A GPT-2 from a safetensors file with OpenAI's names, with or without `transformer.` before them.

    Raises PicogptError when the file is damaged, or its tensors are not those of the model.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise PicogptError(f"{path} is no whole safetensors file: {error}") from error
    state = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("transformer.")
        if name.endswith(MASKS):
            continue
        if not tensor.is_floating_point():
            raise PicogptError(
                f"{path} does not fit the model: {name} holds {tensor.dtype}, not floating-point numbers"
            )
        if name == "lm_head.weight":
            if not torch.equal(tensor, tensors.get("wte.weight", tensors.get("transformer.wte.weight", tensor))):
                raise PicogptError(
                    f"{path} does not fit the model: its lm_head.weight is not wte.weight; GPT-2's head is tied"
                )
            continue
        state[name] = tensor.float().T.contiguous() if name.endswith(TURNED) and tensor.dim() == 2 else tensor.float()
    with shapes_only():
        model = GPT2(config, vocab_size)
    check_tensors(model, state, path)
    model.load_state_dict(state, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_()
    return model.eval()
