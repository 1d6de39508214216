"""The words of the report, but for its end and what was measured afterwards."""

RUNS: dict[str, tuple[str, str]] = {
    "title": (
        "# Context-KV attention: experiment report ({runs}; {method})",
        "# Context-KV Attention 実験レポート（{runs}、{method}）",
    ),
    "unit": (" samples", "サンプル"),
    "and": (", ", "、"),
    "published_label": ("Published ({label})", "公表値（{label}）"),
    # header
    "date": ("**Date**: {value}", "**実験日**: {value}"),
    "environment": ("**Environment**: {value}", "**環境**: {value}"),
    "method": ("**KV method**: {value}", "**KV方式**: {value}"),
    "origin": (
        "**Preset, recipe**: {preset}, {recipe}; random seed {seed}; commit {commit}",
        "**プリセットとレシピ**: {preset}、{recipe}（乱数シード {seed}、コミット {commit}）",
    ),
    "data": (
        "**Data**: {source}; token table: {table}",
        "**データ**: {source}、トークン埋め込み表: {table}",
    ),
    "fixed": ("fixed-count KV", "固定数方式"),
    "variable": ("variable-count KV", "可変数方式"),
    "fixed_long": (
        "method 2 (fixed count): every position attends {slots} slots; "
        "those before the start of the stream are zero vectors",
        "方法2（固定数方式）。どの位置からも{slots}個のスロットを参照し、系列の先頭より前のスロットはゼロベクトルで埋める",
    ),
    "variable_long": (
        "method 1 (variable count): of {slots} slots, those that exist are attended and the others masked",
        "方法1（可変数方式）。{slots}個のスロットのうち実在するものだけを参照し、残りはマスクする",
    ),
    "with_published": (
        "> “Published” columns hold the figures of the original runs (NVIDIA L4); “–” was not published.",
        "> 「公表値」の列は元の実験（NVIDIA L4）の数値。「–」は公表されていない項目。",
    ),
    "without_published": (
        "> The data, model or training settings differ from those of the published runs, "
        "so the figures below cannot be compared with the published ones, and none are shown.",
        "> データ・モデル・学習設定のいずれかが公表された実験と異なるため、"
        "以下の数値は公表値と直接比べられない。公表値は併記しない。",
    ),
    "other_validation": (
        "> The runs were validated on different texts: their perplexities cannot be compared.",
        "> 検証に使ったテキストが実験ごとに異なるため、パープレキシティは互いに比べられない。",
    ),
    # settings
    "settings": ("## Settings", "## 実験設定"),
    "parameter": ("Parameter", "パラメータ"),
    "samples": ("Samples", "サンプル数"),
    "train_tokens": ("Train tokens", "学習トークン数"),
    "val_tokens": ("Val tokens", "検証トークン数"),
    "context_dim": ("Context dim", "コンテキスト次元"),
    "interval": ("Context interval (tokens)", "コンテキスト間隔（トークン）"),
    "interval_geometric": ("from 1 up: slots 0 to {last} back", "1から拡大（{last}トークン前まで）"),
    "heads": ("Heads", "ヘッド数"),
    "max_contexts": ("Max contexts", "最大コンテキスト数"),
    "count_fixed": ("{count} (fixed)", "{count}（固定）"),
    "count_variable": ("up to {count}", "最大{count}"),
    "total_parameters": ("Total parameters", "総パラメータ数"),
    "trainable": ("Trainable in Phase 2", "Phase 2の学習対象"),
    "trainable_value": ("{count:,} ({share:.1%})", "{count:,}（{share:.1%}）"),
    "cached_contexts": ("Contexts in the caches", "キャッシュするコンテキスト"),
    "contexts_passes": ("parallel passes, as published", "並列パス（元の方法）"),
    "contexts_exact": ("exact (true recurrence)", "exact（真の逐次再帰）"),
    "precision": ("Matrix products of Phase 2", "Phase 2の行列積の精度"),
    "window": ("### Context window", "### コンテキストウィンドウの計算"),
    "window_fixed": (
        "→ always {count} key-value slots (missing ones are zero vectors)",
        "→ KVは常に{count}個（足りない分はゼロベクトル）",
    ),
    "window_variable": ("→ at most {count} key-value slots", "→ KVは最大{count}個（足りない分はマスク）"),
    "window_geometric": (
        "→ close together, then ever further apart: {tokens:,} tokens of history within reach",
        "→ 近くは密に、遠くは疎に並び、{tokens:,} トークン前までの履歴に届く",
    ),
    "window_tokens": (
        "→ {count} × {interval} = {tokens:,} tokens of history within reach",
        "→ {count} × {interval} = {tokens:,} トークン前までの履歴に届く",
    ),
    "window_limit": (
        "→ max_contexts={count} keeps {share:.1%} of them",
        "→ max_contexts={count} により、使うのはその {share:.1%}",
    ),
    "window_free": (
        "→ max_contexts={count} is no limit here",
        "→ max_contexts={count} による制限はかからない",
    ),
    # phase 1
    "results": ("## Results", "## 実験結果"),
    "phase1": ("### Phase 1: OACD, training the contexts", "### Phase 1: OACDによるコンテキストの学習"),
    "metric": ("Metric", "指標"),
    "time": ("Time", "所要時間"),
    "time_value": ("{seconds} s ({iterations} iterations)", "{seconds} 秒（{iterations}イテレーション）"),
    "convergence": ("Converged positions", "収束率"),
    "stop": ("Stopped", "停止条件"),
    "stop_converged": ("iteration {n} (converged ≥ {rate:.0%})", "イテレーション{n}（収束率 ≥ {rate:.0%}）"),
    "stop_plateau": (
        "iteration {n} (plateau above {plateau:.0%})",
        "イテレーション{n}（{plateau:.0%}超で頭打ち）",
    ),
    "stop_max_iterations": ("iteration {n} (limit reached)", "イテレーション{n}（上限に到達）"),
    "rank": ("Effective rank", "有効ランク"),
    "phase1_trace": (
        "Loss and convergence by iteration, {label}:",
        "イテレーションごとの損失と収束率（{label}）:",
    ),
    "iteration": ("Iteration", "イテレーション"),
    "loss": ("Loss", "損失"),
    "published_loss": ("Published loss", "公表値の損失"),
    "published_convergence": ("Published convergence", "公表値の収束率"),
    "phase1_figure": (
        "![Converged positions and OACD loss by iteration]({folder}/phase1.png)",
        "![イテレーションごとの収束率とOACD損失]({folder}/phase1.png)",
    ),
    # phase 2
    "phase2": ("### Phase 2: training Context-KV attention", "### Phase 2: Context-KV Attentionの学習"),
    "epoch": ("Epoch", "エポック"),
    "note": ("Note", "備考"),
    "published_val_ppl": ("Published Val PPL", "公表値 Val PPL"),
    "published_val_acc": ("Published Val Acc", "公表値 Val Acc"),
    "published_train_ppl": ("Published Train PPL", "公表値 Train PPL"),
    "best": ("best", "最良"),
    "improved": ("improved", "改善"),
    "worse": ("worse", "悪化"),
    "stopped": ("worse; early stop", "悪化、早期終了"),
    "ppl_figure": (
        "![Train and validation perplexity by epoch]({folder}/ppl_curves.png)",
        "![エポックごとの学習・検証パープレキシティ]({folder}/ppl_curves.png)",
    ),
    "final_one": ("### Final result (epoch {epoch})", "### 最終結果（エポック{epoch}時点）"),
    "final_many": ("### Final results (best epoch of each run)", "### 最終結果（各実験の最良エポック時点）"),
    "best_epoch": ("Best epoch", "最良エポック"),
    "epochs_run": ("Epochs run", "実行エポック数"),
    "epoch_time": ("Time an epoch", "エポックあたりの時間"),
    "seconds": ("{seconds} s", "{seconds} 秒"),
    # early stopping
    "early": ("## Early stopping", "## 早期終了の動作確認"),
    "early_worked": (
        "**{label}: early stopping worked as set**: training ended after {patience} epochs in a row "
        "without a lower validation PPL.",
        "**{label}: 早期終了は設定どおりに働いた**。検証PPLが{patience}エポック続けて下がらず終了した。",
    ),
    "early_unused": (
        "**{label}: early stopping did not trigger**: training ran to its limit of {limit} epochs.",
        "**{label}: 早期終了は発動しなかった**。上限の{limit}エポックまで学習した。",
    ),
    "early_odd": (
        "**{label}: the stop does not match the setting**: no_improve={seen} at the last epoch, "
        "patience={patience}.",
        "**{label}: 停止時点が設定と合わない**。最終の no_improve={seen}、設定は patience={patience}。",
    ),
    "early_best": (
        "Epoch {epoch}: val_ppl={ppl} → best (no_improve={count})",
        "Epoch {epoch}: val_ppl={ppl} → 最良（no_improve={count}）",
    ),
    "early_worse": (
        "Epoch {epoch}: val_ppl={ppl} → worse (no_improve={count})",
        "Epoch {epoch}: val_ppl={ppl} → 悪化（no_improve={count}）",
    ),
    "early_end": (" → early stop", " → 早期終了"),
    # comparison
    "comparison": ("## Comparison: {runs}", "## 比較: {runs}"),
    "versus": (" vs ", " vs "),
    "improvement": ("change", "変化"),
    "published_improvement": ("published change", "公表値の変化"),
    "val_ppl": ("Val PPL", "Val PPL"),
    "val_acc": ("Val Acc", "Val Acc"),
    "train_ppl": ("Train PPL", "Train PPL"),
    "row_best_epoch": ("Best Epoch", "Best Epoch"),
    "gap": ("Train/Val Gap", "Train/Val Gap"),
    "lower": ("{percent:.1f}% lower", "{percent:.1f}% 低下"),
    "higher": ("{percent:.1f}% higher", "{percent:.1f}% 上昇"),
    "below": ("{percent:.1f}% lower", "{percent:.1f}%低い"),
    "above": ("{percent:.1f}% higher", "{percent:.1f}%高い"),
    "points": ("{points:+.1f} points", "{points:+.1f} ポイント"),
    "same": ("same", "同じ"),
    "epochs_change": ("{change:+d} epochs", "{change:+d} エポック"),
    "observations": ("**Observations:**", "**観察:**"),
    "saw_data": (
        "- {times:.1f} times the training tokens ({before:,} → {after:,}).",
        "- 学習トークン数は{times:.1f}倍（{before:,} → {after:,}）。",
    ),
    "saw_same_data": (
        "- The training tokens are the same ({after:,}); the runs differ in their settings.",
        "- 学習トークン数は同じ（{after:,}）で、違いは設定にある。",
    ),
    "saw_ppl_down": (
        "- Val PPL fell from {before} to {after}, {percent:.1f}% lower.",
        "- Val PPLは{before}から{after}へ、{percent:.1f}%下がった。",
    ),
    "saw_ppl_up": (
        "- Val PPL did not fall: from {before} to {after}, {percent:.1f}% higher.",
        "- Val PPLは下がらず、{before}から{after}へ{percent:.1f}%上がった。",
    ),
    "saw_same": ("- {name} is the same: {value}.", "- {name}は同じ（{value}）。"),
    "saw_acc_up": (
        "- Val accuracy rose by {points:.1f} points.",
        "- 検証正解率は{points:.1f}ポイント上がった。",
    ),
    "saw_acc_down": (
        "- Val accuracy did not rise: {points:.1f} points lower.",
        "- 検証正解率は上がらず、{points:.1f}ポイント下がった。",
    ),
    "saw_gap_smaller": (
        "- The gap between train and val PPL narrowed, from {before} to {after}.",
        "- 学習PPLと検証PPLの開きは{before}から{after}へ縮まった。",
    ),
    "saw_gap_larger": (
        "- The gap between train and val PPL widened, from {before} to {after}.",
        "- 学習PPLと検証PPLの開きは{before}から{after}へ広がった。",
    ),
    # overfitting
    "overfitting": ("## Overfitting", "## 過学習の分析"),
    "at_best": ("{label}, epoch {epoch} (best):", "{label}、エポック{epoch}（最良）:"),
    "at_last": ("{label}, epoch {epoch} (last):", "{label}、エポック{epoch}（最終）:"),
    "overfit_yes": (
        "**{label}: train PPL kept falling ({train}) while val PPL rose ({val})**, the mark of overfitting.",
        "**{label}: 学習PPLは下がり続けた（{train}）が、検証PPLは上がった（{val}）**。典型的な過学習である。",
    ),
    "overfit_not_yet": (
        "**{label}: val PPL was at its lowest at the last epoch**: it had not begun to rise.",
        "**{label}: 検証PPLは最終エポックで最小となった**。上昇にはまだ転じていない。",
    ),
    "overfit_unclear": (
        "**{label}: val PPL was not lowered after epoch {epoch}, and train PPL did not fall either**: "
        "no clear overfitting.",
        "**{label}: エポック{epoch}以降、検証PPLも学習PPLも下がっていない**。明確な過学習とはいえない。",
    ),
    "ratio_table": ("Val PPL / train PPL by epoch:", "エポックごとの検証PPL / 学習PPL:"),
    # memory
    "memory": ("## Memory", "## メモリ使用量"),
    "memory_unit": (
        "GiB at the end of each stage; in brackets the peak so far.",
        "単位はGiB。各段階の終了時の値で、括弧内はそれまでのピーク。",
    ),
    "stage": ("Stage", "段階"),
    "data loaded": ("data loaded", "データ読み込み後"),
    "model built": ("model built", "モデル構築後"),
    "phase 1 done": ("Phase 1 done", "Phase 1後"),
    "phase 2 prepared": ("Phase 2 prepared", "Phase 2準備後"),
    "first epoch": ("first epoch", "最初のエポック後"),
    "last epoch": ("last epoch", "最後のエポック後"),
    "memory_figure": (
        "![Memory by stage]({folder}/memory.png)",
        "![段階ごとのメモリ使用量]({folder}/memory.png)",
    ),
    "caches": ("**Cache sizes** (MiB):", "**キャッシュサイズ**（MiB）:"),
    "cache": ("Cache", "キャッシュ"),
    "held": ("{label}: held", "{label}: 実際の保持量"),
    "dense": ("{label}: published layout (fp32)", "{label}: 元の配置（fp32）"),
    "total": ("**total**", "**合計**"),
    # slots
    "slots_fixed": ("## Fixed-count KV (method 2) by example", "## 固定数方式（方法2）の具体例"),
    "slots_variable": ("## Variable-count KV (method 1) by example", "## 可変数方式（方法1）の具体例"),
    "slots_rule_grid": (
        "interval={interval}, max_contexts={count}: position i sees its own context and, before it, those on "
        "multiples of {interval}, nearest first: min((i + {last_step}) // {interval} + 1, {count}) in all.",
        "interval={interval}、max_contexts={count}: 位置iが参照するのは自身のコンテキストと、それより前にある"
        "{interval}の倍数の位置のコンテキスト（近い順）で、"
        "合計 min((i + {last_step}) // {interval} + 1, {count}) 個。",
    ),
    "slots_rule_geometric": (
        "max_contexts={count}: position i sees its own context and those that lie {offsets} before it, where "
        "they exist.",
        "max_contexts={count}: 位置iが参照するのは自身のコンテキストと、"
        "その{offsets}個前のもののうち実在するもの。",
    ),
    "slots_rule_current": (
        "interval={interval}, max_contexts={count}: position i sees contexts i − {interval}k, "
        "k = 0 … {last}, where they exist: min(i // {interval} + 1, {count}) of them.",
        "interval={interval}、max_contexts={count}: 位置iが参照するのはコンテキスト i − {interval}k"
        "（k = 0 … {last}）のうち実在するもので、その数は min(i // {interval} + 1, {count})。",
    ),
    "slot_fixed": ("({real} real + {rest} zero)", "（実データ{real} + ゼロ{rest}）"),
    "slot_variable": ("({real} real, {rest} masked)", "（実データ{real}、マスク{rest}）"),
    "slots_slip": (
        "(The original report gives 1 real context at position 50; by the formula, which its own "
        "other lines follow, it is 3.)",
        "（元のレポートは位置50の実データを1個としているが、同じレポートの他の行も従う式によれば3個である。）",
    ),
    "gains_fixed": (
        "**What it gives:**\n- Tensors of one shape at every position.\n- Batches without padding or masks.\n"
        "- The number of zero slots tells the model how much history there is.",
        "**利点:**\n- どの位置でもテンソルの形が同じになる。\n- マスクや長さ揃えなしでバッチを組める。\n"
        "- ゼロのスロットの数から、モデルは履歴の長さを読み取れる。",
    ),
    "gains_variable": (
        "**What it gives:**\n- No attention is spent on slots that hold nothing.\n"
        "- The first positions of a stream are not diluted by zero vectors.",
        "**利点:**\n- 中身のないスロットに注意が割かれない。\n"
        "- 系列の先頭付近の出力がゼロベクトルで薄まらない。",
    ),
}
