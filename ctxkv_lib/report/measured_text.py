"""The words of `measured.py`, as in `text.py`: (English, Japanese) for each key."""

MEASURED_TEXT: dict[str, tuple[str, str]] = {
    "yardsticks": ("### Test split and yardsticks", "### テスト分割と比較の目安"),
    "yardsticks_how": (
        "The test split chooses nothing; it was measured once, with the best epoch’s weights. n-grams are "
        "interpolated modified Kneser-Ney, counted on the training tokens; the cache adds the share of the "
        "next token in the context window. Their order, floor and weight are chosen on validation.",
        "テスト分割は何の選択にも使わず、最良エポックの重みで一度だけ測る。nグラムは学習トークンを数えた補間付き"
        "修正Kneser-Neyで、キャッシュはコンテキストウィンドウ内での次トークンの割合を加える。"
        "次数・底の分布・重みは検証データで選ぶ。",
    ),
    "test_ppl": ("Test PPL", "Test PPL"),
    "test_acc": ("Test Acc", "Test Acc"),
    "kneser_ney_val": ("Val PPL of n-grams", "nグラムの Val PPL"),
    "kneser_ney_test": ("Test PPL of n-grams", "nグラムの Test PPL"),
    "kneser_ney_cache_val": ("Val PPL of n-grams and cache", "nグラム＋キャッシュの Val PPL"),
    "kneser_ney_cache_test": ("Test PPL of n-grams and cache", "nグラム＋キャッシュの Test PPL"),
    "floor uniform": ("uniform floor", "底は一様分布"),
    "floor table text": ("floor: unigrams of the table’s text", "底は埋め込み表の元テキストのユニグラム"),
    "yardsticks_val": (
        "- {label}: val PPL is {plain:+.1f}% against n-grams of order {order} ({floor}), "
        "{cached:+.1f}% against n-grams and cache.",
        "- {label}: Val PPLは{order}次のnグラム（{floor}）に対して{plain:+.1f}%、"
        "nグラム＋キャッシュに対して{cached:+.1f}%。",
    ),
    "yardsticks_test": (
        "- {label}: test PPL is {plain:+.1f}% against n-grams of order {order} ({floor}), "
        "{cached:+.1f}% against n-grams and cache.",
        "- {label}: Test PPLは{order}次のnグラム（{floor}）に対して{plain:+.1f}%、"
        "nグラム＋キャッシュに対して{cached:+.1f}%。",
    ),
}
