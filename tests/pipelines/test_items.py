"""Text form of task keys."""

from __future__ import annotations

from nemo_rl.pipelines.items import key_text


def test_key_text_sorts_like_keys() -> None:
    numbers = [0, 1, 9, 10, 11, 99, 100, 101, 99_998, 99_999, 100_000, 1_000_000]
    keys = [(source,) for source in numbers]
    keys += [(source, child) for source in numbers for child in numbers]
    keys += [(3, child, other) for child in numbers for other in numbers]
    keys.sort()
    texts = [key_text(key) for key in keys]
    assert texts == sorted(texts)
    assert len(set(texts)) == len(keys)
    examples = [key_text(key) for key in ((3,), (3, 1), (3, 10, 0), (100_000,))]
    assert examples == ["00003", "00003.1", "00003.a10.0", "a100000"]
