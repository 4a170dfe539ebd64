"""Continue a text with a trained model, in one process, from a checkpoint of any layout.

P = prompt tokens, V = vocabulary
"""

from collections.abc import Callable

import torch
from torch import Tensor

from gangline.comm.mesh import Mesh
from gangline.trainers.attention import KeyValueCache
from gangline.trainers.checkpoint import CheckpointInfo, Shard, load
from gangline.trainers.config import TrainConfig
from gangline.trainers.model import Transformer
from gangline.trainers.tokenizer import Tokenizer


def load_model(
    config: TrainConfig, checkpoint: CheckpointInfo, *, vocab_size: int, device: str = "cpu"
) -> Transformer:
    """Return the whole model of a checkpoint, all experts included, in fp32.

    Raises: CheckpointError where the checkpoint is not of this config, CorruptCheckpointError.
    """
    model = Transformer(config.model, vocab_size=vocab_size, max_positions=config.data.seq_len)
    model.to(device)
    weights = {f"model.{name}": Shard.whole(p.data) for name, p in model.named_parameters()}
    # Not strict: the optimizer's tensors stay where they are.
    load(checkpoint, weights, Mesh.single(device), strict=False)
    return model.eval()


@torch.inference_mode()
def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    num_tokens: int,
    temperature: float = 0.8,
    top_k: int | None = 40,
    seed: int = 0,
    on_text: Callable[[str], None] = lambda text: None,
) -> str:
    """Return the continuation of `prompt`, without the prompt.

    Ends after `num_tokens` tokens or at the end of the document. Temperature 0 takes the likeliest
    token. The same arguments give the same text. `on_text` gets each piece as soon as its
    characters are complete.

    The model knows as many positions as its samples had. When they are used up, the newer half of
    the text is read again as the beginning, so a text may be of any length.

    Raises: ValueError for a temperature below 0, top_k below 1 or num_tokens below 0.
    """
    if temperature < 0 or num_tokens < 0 or (top_k is not None and top_k < 1):
        raise ValueError(
            f"temperature is {temperature}, top_k {top_k}, num_tokens {num_tokens}; give a "
            "temperature of at least 0, a top_k of at least 1 and num_tokens of at least 0"
        )
    generator = torch.Generator().manual_seed(seed)
    # An empty prompt starts where documents start: after the end of another one.
    context = tokenizer.encode(prompt) or [tokenizer.eos_id]
    written: list[int] = []
    shown = ""
    window = _Window(model)
    for _ in range(num_tokens):
        logits_V = window.next_logits(context + written)
        token = _choose(logits_V, temperature, top_k, generator)
        if token == tokenizer.eos_id:
            break
        written.append(token)
        text = tokenizer.decode(written)
        # A character may take several tokens; until it is complete it decodes to U+FFFD.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            on_text(text[len(shown) :])
            shown = text
    text = tokenizer.decode(written)
    on_text(text[len(shown) :])
    return text


class _Window:
    """Feed a growing list of tokens to the model, each of them once while they fit."""

    def __init__(self, model: Transformer) -> None:
        self._model = model
        self._size = model.rotation_SC.shape[0]
        self._start = 0  # of the list, where position 0 is
        self._caches: list[KeyValueCache] = []

    def next_logits(self, tokens: list[int]) -> Tensor:
        """Return the scores [V] of what follows all of `tokens`, on the CPU in fp32."""
        is_full = len(tokens) - self._start > self._size
        if not self._caches or is_full:
            if is_full:
                self._start = len(tokens) - max(1, self._size // 2)
            self._caches = [KeyValueCache() for _ in self._model.layers]
            new = tokens[self._start :]
        else:
            new = tokens[-1:]
        inputs = torch.tensor([new], device=self._model.embedding.device)
        logits_BSV: Tensor
        logits_BSV, _ = self._model(inputs, self._caches)
        return logits_BSV[0, -1].float().cpu()


def _choose(
    logits_V: Tensor, temperature: float, top_k: int | None, generator: torch.Generator
) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    scaled_V = logits_V / temperature
    if top_k is not None and top_k < scaled_V.numel():
        scaled_V[scaled_V < scaled_V.topk(top_k).values[-1]] = -torch.inf
    probabilities_V = scaled_V.softmax(-1)
    return int(torch.multinomial(probabilities_V, 1, generator=generator))
