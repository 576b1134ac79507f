"""Attention masks as a dump holds them: `attention_mask` (B, T) for padding, `documents` (B, T) for rows of several documents.

A mask of four axes says for every query which keys it sees. The reference knows causal attention inside documents, so a mask that
says just this is taken apart, and any other is refused.
"""

import torch

WORDS = "dump_step: the 4-D attention mask "


def allowed(mask, rows, length):
    """(B, T, T), true where a query sees a key, of a mask (1 or B, heads, T, T): booleans, or numbers that are added to the scores."""
    mask = mask.detach().to("cpu")
    if (
        mask.dim() != 4
        or mask.shape[0] not in (1, rows)
        or tuple(mask.shape[2:]) != (length, length)
    ):
        raise ValueError(
            f"{WORDS}is {tuple(mask.shape)}: {(rows, 1, length, length)} expected (no cache)"
        )
    if mask.dtype == torch.bool:
        seen = mask
    elif mask.is_floating_point():
        seen = mask == 0
        # Transformers fills with the smallest number of the format, others with -inf or -1e4.
        if not bool((seen | (mask <= -1e4)).all()):
            raise ValueError(
                f"{WORDS}adds other numbers than 0 and -inf to the scores: biases are not known"
            )
    else:
        raise ValueError(
            f"{WORDS}holds {mask.dtype}: booleans, or numbers that are added to the scores, expected"
        )
    if not bool((seen == seen[:, :1]).all()):
        raise ValueError(f"{WORDS}differs between heads")
    return seen[:, 0].expand(rows, length, length)


def documents_of(seen):
    """`attention_mask` and `documents` (B, T) that say what `seen` (B, T, T) does; neither where every row is one document."""
    rows, length, _ = seen.shape
    numbers = torch.arange(length)
    real = torch.zeros(rows, length, dtype=torch.long)
    documents = torch.zeros(rows, length, dtype=torch.long)
    for b in range(rows):
        keys = seen[b].any(0)
        document, start = -1, None
        for t in numbers[keys].tolist():
            # What padding sees matters to nobody.
            places = numbers[seen[b, t]]
            if len(places) == 0:
                raise ValueError(f"{WORDS}lets token {t} of row {b} see nothing, yet others see it")
            first = int(places[0])
            if first == t:
                document, start = document + 1, t
            expected = keys & (numbers >= first) & (numbers <= t)
            if first != start or not torch.equal(seen[b, t], expected):
                # Padding on the right that sees itself, so that no row of the softmax is empty.
                if int(seen[b, :, t].sum()) <= 1:
                    keys[t] = False
                    continue
                raise ValueError(
                    f"{WORDS}is not causal inside documents (token {t} of row {b}): prefixes that see what comes later, "
                    "windows and gaps are not known"
                )
            documents[b, t] = document
        real[b] = keys
        # Padding belongs to the document before it.
        for t in range(1, length):
            if not keys[t]:
                documents[b, t] = documents[b, t - 1]
    found = {}
    if not bool(real.all()):
        found["attention_mask"] = real
    if bool((documents > 0).any()):
        found["documents"] = documents
    return found


def windowed(seen, window):
    """`seen` inside a window: a query sees its own key and window - 1 before it."""
    length = seen.shape[-1]
    distance = torch.arange(length)[:, None] - torch.arange(length)[None]
    return seen & (distance < window)


def of_batch(mask, rows, length, config):
    """What the mask that a model is called with says: `attention_mask`, `documents`."""
    window = (
        getattr(config, "sliding_window", None)
        if getattr(config, "use_sliding_window", True)
        else None
    )
    kinds = set(
        getattr(config, "layer_types", None)
        or (["sliding_attention"] if window else ["full_attention"])
    )
    binds = window is not None and window < length and "sliding_attention" in kinds
    if isinstance(mask, dict):
        given = {kind: mask[kind] for kind in kinds if mask.get(kind) is not None}
        if not given:
            return {}
        seen = {kind: allowed(m, rows, length) for kind, m in given.items()}
        whole = seen.get("full_attention", next(iter(seen.values())))
        if "sliding_attention" in seen and binds:
            if "full_attention" not in seen or not torch.equal(
                seen["sliding_attention"], windowed(whole, window)
            ):
                raise ValueError(
                    f"{WORDS}of the layers with a window is not that of the others inside the window"
                )
        elif any(not torch.equal(m, whole) for m in seen.values()):
            raise ValueError(f"{WORDS}differs between kinds of layers")
        return documents_of(whole)
    if not isinstance(mask, torch.Tensor):
        raise ValueError(f"dump_step: attention_mask is a {type(mask).__name__}: a tensor expected")
    if mask.dim() == 2:
        if mask.is_floating_point() and not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("dump_step: attention_mask (B, T) holds other numbers than 0 and 1")
        return {"attention_mask": mask.detach().to("cpu", copy=True).long()}
    if binds:
        raise ValueError(
            f"{WORDS}takes the place of the window of {window} tokens in every layer, which the reference keeps: pass a "
            "dict with a mask for each kind of layer, or rows no longer than the window"
        )
    return documents_of(allowed(mask, rows, length))
