"""The words of test split, yardsticks and what contexts remember."""

MEASURED: dict[str, tuple[str, str]] = {
    "yardsticks": ("### Test split and yardsticks", "### テスト分割と比較の目安"),
    "yardsticks_how": (
        "The test split chooses nothing; it was measured once, with the best epoch’s weights. n-grams are "
        "interpolated modified Kneser-Ney, counted on the training tokens; the cache adds the share of the "
        "next token in the context window. Their order, floor and weight are chosen on validation. A token "
        "table made from text brings some of that text’s statistics into the model; beside it stand n-grams "
        "and cache that count all of that text, too.",
        "テスト分割は何の選択にも使わず、最良エポックの重みで一度だけ測る。nグラムは学習トークンを数えた補間付き"
        "修正Kneser-Neyで、キャッシュはコンテキストウィンドウ内での次トークンの割合を加える。"
        "次数・底の分布・重みは検証データで選ぶ。テキストから作った埋め込み表はそのテキストの統計をモデルに持ち込むので、"
        "そのテキストもすべて数えたnグラム＋キャッシュを並べる。",
    ),
    "test_ppl": ("Test PPL", "Test PPL"),
    "test_acc": ("Test Acc", "Test Acc"),
    "kneser_ney_val": ("Val PPL of n-grams", "nグラムの Val PPL"),
    "kneser_ney_test": ("Test PPL of n-grams", "nグラムの Test PPL"),
    "kneser_ney_cache_val": ("Val PPL of n-grams and cache", "nグラム＋キャッシュの Val PPL"),
    "kneser_ney_cache_test": ("Test PPL of n-grams and cache", "nグラム＋キャッシュの Test PPL"),
    "kneser_ney_table_cache_val": (
        "Val PPL of n-grams (table’s text too) and cache",
        "nグラム（表の元テキストも）＋キャッシュの Val PPL",
    ),
    "kneser_ney_table_cache_test": (
        "Test PPL of n-grams (table’s text too) and cache",
        "nグラム（表の元テキストも）＋キャッシュの Test PPL",
    ),
    "floor uniform": ("uniform floor", "底は一様分布"),
    "floor table text": ("floor: unigrams of the table’s text", "底は埋め込み表の元テキストのユニグラム"),
    "yardsticks_val": (
        "- {label}: val PPL, against n-grams of order {order} ({floor}): {plain}; "
        "against n-grams and cache: {cached}.",
        "- {label}: Val PPLは、{order}次のnグラム（{floor}）に対して: {plain}、"
        "nグラム＋キャッシュに対して: {cached}。",
    ),
    "yardsticks_test": (
        "- {label}: test PPL, against n-grams of order {order} ({floor}): {plain}; "
        "against n-grams and cache: {cached}.",
        "- {label}: Test PPLは、{order}次のnグラム（{floor}）に対して: {plain}、"
        "nグラム＋キャッシュに対して: {cached}。",
    ),
    "test_error": (
        "- {label}: on other conversations test PPL would be another, ±{error:.1%} (standard error over the "
        "{count} of the test).",
        "- {label}: 会話が違えばTest PPLも変わる。±{error:.1%}（テストの{count}会話にわたる標準誤差）。",
    ),
    "test_paired": (
        "- {label} against {base}, conversation by conversation: test PPL {change:+.1%}, ±{error:.1%}.",
        "- {label}を{base}と会話ごとに比べると: Test PPL {change:+.1%}、±{error:.1%}。",
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
    "used": ("### What the contexts are used for", "### コンテキストは何に使われているか"),
    "used_how": (
        "The same weights at the same validation positions, reading other contexts; nothing is trained. "
        "Those of another conversation are wrong, but of the kind the model knows: what they do not harm is "
        "not read. Zeros harm also a model that only counts on some context being there. "
        "Behind ± stands the standard error.",
        "同じ重み・同じ検証位置で、読ませるコンテキストだけを変える（再学習なし）。別の会話のコンテキストは内容は誤りだが"
        "モデルの見慣れた種類なので、それで悪化しなければ内容は読まれていない。ゼロは、何らかのコンテキストがあることに"
        "頼るだけのモデルも悪化させる。±の後は標準誤差。",
    ),
    "used_contexts": ("Contexts ({count:,} positions)", "コンテキスト（{count:,}位置）"),
    "used_change": ("against its own", "本来のものとの差"),
    "used_percent": ("{percent:+.1f}% ± {error:.1f}", "{percent:+.1f}% ± {error:.1f}"),
    "used_intact": ("its own", "本来のもの"),
    "used_zero": ("zeros", "すべてゼロ"),
    "used_shuffled": ("of other positions, mixed", "別々の位置から混ぜたもの"),
    "used_elsewhere": ("of another conversation", "別の会話のもの"),
    "used_slot_0": ("only slot 0 its own", "スロット0だけ本来のもの"),
    "used_kind": ("Next token", "次トークン"),
    "used_positions": ("positions", "位置数"),
    "used_other_ppl": ("with those of another conversation", "別の会話のコンテキストで"),
    "used_by_repetition_0": ("in no pair seen in the window", "ウィンドウ内に既出でない対"),
    "used_by_repetition_1": ("in a pair seen in the window", "ウィンドウ内に既出の対"),
    "used_by_history": ("{span} tokens of its conversation before it", "会話内でその前に{span}トークン"),
    "used_by_frequency": ("{span} times in the training text", "学習テキストに{span}回出現"),
    "used_measured": ("Positions measured", "測った位置数"),
    "used_ppl_at": ("Val PPL of a token {kind} (positions)", "Val PPL（{kind}；位置数）"),
    "used_figure": (
        "![What other contexts cost, slot by slot and at repeated pairs]({folder}/ablations.png)",
        "![コンテキストを変えたときの損失、スロット別、既出の対での比較]({folder}/ablations.png)",
    ),
    "recall": ("### The recall task", "### 想起課題"),
    "recall_how": (
        "Pairs of words are told once; where the first word comes again, the second is asked for. By the "
        "distance from where it was told, and by how many tokens the nearest slot at or after it has read "
        "since: a context that has forgotten it by then cannot bring it back.",
        "一度だけ告げられた語の対について、最初の語が再び現れたときに続く語を当てられるか。告げられた位置からの距離と、"
        "それ以後で最も近いスロットがその後に読んだトークン数で分ける。コンテキストがそれまでに忘れていれば取り出せない。",
    ),
    "recall_answers": ("answers", "回答数"),
    "recall_accuracy": ("right", "正答率"),
    "recall_guessing": ("right by guessing a value", "値を当て推量した場合の正答率"),
    "recall_ppl": ("PPL", "PPL"),
    "recall_worst": ("lowest at a place between slots", "スロット間の位置での最低値"),
    "recall_at": ("{share:.1%} at {span}", "{share:.1%}（{span}）"),
    "recall_by_distance": ("Distance (tokens)", "距離（トークン）"),
    "recall_by_place": (
        "Read since by the nearest slot (tokens)",
        "最も近いスロットがその後に読んだトークン数",
    ),
    "recall_figure": (
        "![Right answers by distance and by place between slots]({folder}/recall_task.png)",
        "![距離別・スロット間の位置別の正答率]({folder}/recall_task.png)",
    ),
    "generated": ("### Does generated text repeat itself?", "### 生成テキストは繰り返すか"),
    "generated_how": (
        "Always the likeliest token, from prompts cut out of the validation text. A token counts as repeated "
        "if its sample had it before. Beside it, the text that really goes on there.",
        "検証テキストから切り出したプロンプトに、常に最尤のトークンを続ける。"
        "同じサンプル内に既に現れたトークンを繰り返しと数え、実際の続きと比べる。",
    ),
    "generated_text": ("Samples", "サンプル数"),
    "generated_run": ("Longest run of one token", "同一トークンの最長連続"),
    "generated_run_text": ("Longest run in the real text", "同一トークンの最長連続（実際の続き）"),
    "generated_repeated": ("Repeated tokens", "繰り返しトークンの割合"),
    "generated_repeated_text": ("Repeated tokens in the real text", "繰り返しトークンの割合（実際の続き）"),
    "generated_sample": (
        "The first sample, not chosen:\n\n- prompt: {prompt}\n- continued: {generated}",
        "最初のサンプル（選別なし）:\n\n- プロンプト: {prompt}\n- 生成された続き: {generated}",
    ),
}
