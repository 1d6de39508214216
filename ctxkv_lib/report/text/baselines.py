"""The words of what stands beside the contexts."""

BASELINES: dict[str, tuple[str, str]] = {
    "memory_fresh": ("untrained contexts", "未学習のコンテキスト"),
    "memory_end_to_end": ("contexts trained end to end", "一括学習のコンテキスト"),
    "memory_tokens": ("tokens in the slots", "スロットにトークン"),
    "memory_none": ("no memory", "記憶なし"),
    "memory_transformer": ("a causal attention block", "因果的注意ブロック"),
    "memory_gru": ("a GRU", "GRU"),
    "memory_long": (
        "baseline, {memory} instead of contexts, with as many trained weights",
        "ベースライン。コンテキストの代わりに{memory}を使い、学習する重みの数は同じ",
    ),
    "stop_untrained": ("not trained", "学習なし"),
}
