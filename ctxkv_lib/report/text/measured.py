"""The words of test split, yardsticks and what contexts remember."""

MEASURED: dict[str, tuple[str, str]] = {
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
    "remember": ("### What the contexts remember", "### コンテキストが覚えていること"),
    "remember_how": (
        "How much of the embedding of the token so many positions back can be read off a context: R² of a "
        "ridge regression fitted on training contexts and measured on validation, and in brackets how often "
        "the token itself is read. Up to the horizon R² stays above 0.01.",
        "何トークン前の埋め込みをコンテキストから読み出せるか。学習データで当てはめ検証データで測ったリッジ回帰のR²で、"
        "括弧内はトークンそのものを言い当てた割合。ホライズンはR²が0.01を上回り続ける最長の距離。",
    ),
    "remember_trained": ("trained", "学習後"),
    "remember_fresh": ("fresh, weights {std}", "未学習（重み {std}）"),
    "remember_back": ("{distance} back", "{distance}トークン前"),
    "remember_cell": ("{r2:.2f} ({top1:.0%})", "{r2:.2f}（{top1:.0%}）"),
    "remember_mean": ("mean of the last {interval}", "直近{interval}トークンの平均"),
    "remember_horizon": ("Horizon (tokens)", "ホライズン（トークン）"),
    "remember_coverage": ("Window held by some slot", "いずれかのスロットが保持するウィンドウの割合"),
    "remember_centroid": ("Common part (centroid)", "共通成分（重心）"),
    "remember_effective_rank": ("Effective rank", "有効ランク"),
    "remember_verdict": (
        "- {label}: horizon {reach}; the slots hold {share:.0%} of the window’s tokens.",
        "- {label}: ホライズンは{reach}。スロットが保持するのはウィンドウ内のトークンの{share:.0%}。",
    ),
    "remember_figure": (
        "![What contexts hold of each token, and what the slots leave out]({folder}/probe.png)",
        "![コンテキストが保持する情報と、スロットの間で失われる部分]({folder}/probe.png)",
    ),
}
