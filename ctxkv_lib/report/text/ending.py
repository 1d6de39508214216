"""What the report ends with: the next experiments, and the conclusion."""

ENDING: dict[str, tuple[str, str]] = {
    # next
    "next": ("## Next experiments", "## 今後の実験案"),
    "next_interval": (
        "1. **Longer interval**: {interval} → {a} or {b}, a window of {tokens_a:,} or {tokens_b:,} tokens "
        "(`--set model.interval={a}`).",
        "1. **間隔を広げる**: {interval} → {a}、{b}。ウィンドウは{tokens_a:,}、{tokens_b:,}トークンになる"
        "（`--set model.interval={a}`）。",
    ),
    "next_samples": (
        "2. **More data**: {samples:,} → {a:,} or {b:,} samples (`--samples {a}`).",
        "2. **データを増やす**: {samples:,} → {a:,}、{b:,}サンプル（`--samples {a}`）。",
    ),
    "next_samples_file": (
        "2. **More data**: {samples:,} training conversations so far; each further one in {path} helps.",
        "2. **データを増やす**: 学習に使った会話は{samples:,}件。{path} に会話を足すほど効く。",
    ),
    "next_file": (
        "A wider window takes more of a file for validation; to compare runs, give both the same "
        "`--set data.validation_samples=N --set data.test_samples=M`.",
        "ウィンドウを広げると、検証に回すテキストも増える。実験を比べるには、どちらにも同じ"
        "`--set data.validation_samples=N --set data.test_samples=M`を指定する。",
    ),
    "next_regularise": (
        "3. **Regularisation**, as val PPL rises after its best epoch: dropout {dropout:g} → {a:g}, "
        "weight decay {decay:g} → {b:g} "
        "(`--set model.attention_dropout={a:g} --set phase2.weight_decay={b:g}`).",
        "3. **正則化を強める**（最良エポックの後に検証PPLが上がるため）: dropout {dropout:g} → {a:g}、"
        "weight decay {decay:g} → {b:g}"
        "（`--set model.attention_dropout={a:g} --set phase2.weight_decay={b:g}`）。",
    ),
    "next_epochs": (
        "3. **Longer training**, as val PPL had not begun to rise: {limit} → {a} epochs "
        "(`--set phase2.max_epochs={a}`).",
        "3. **学習を延ばす**（検証PPLがまだ上昇に転じていないため）: {limit} → {a}エポック"
        "（`--set phase2.max_epochs={a}`）。",
    ),
    "next_contexts": (
        "4. **More contexts**: {count} → {a} slots, {tokens:,} tokens of history "
        "(`--set model.max_contexts={a}`).",
        "4. **コンテキストを増やす**: {count} → {a}スロット、履歴{tokens:,}トークン"
        "（`--set model.max_contexts={a}`）。",
    ),
    # conclusion
    "conclusion": ("## Conclusion", "## 結論"),
    "end_run": (
        "- **{label}: val PPL {ppl}, accuracy {acc}** at epoch {epoch} of {epochs} with {method}.",
        "- **{label}: Val PPL {ppl}、正解率 {acc}**（全{epochs}エポック中、エポック{epoch}が最良。{method}）",
    ),
    "end_published": (
        "- {label}: the published val PPL is {published}; this run’s is {change:+.1f}% against it.",
        "- {label}: 公表された Val PPL は{published}で、今回の値はそれに対して{change:+.1f}%。",
    ),
    "end_better": (
        "- **From {first} to {last}, val PPL fell by {percent:.1f}%.**",
        "- **{first}から{last}で、Val PPLは{percent:.1f}%下がった。**",
    ),
    "end_not_better": (
        "- **From {first} to {last}, val PPL did not fall ({percent:.1f}% higher).**",
        "- **{first}から{last}で、Val PPLは下がらなかった（{percent:.1f}%上昇）。**",
    ),
    "end_same": ("- **{first}, {last}: the same val PPL.**", "- **{first}、{last}: Val PPLは同じ。**"),
    "end_early": (
        "- Runs ended by early stopping: {count} of {runs}.",
        "- 早期終了で終わった実験: {count}/{runs}件。",
    ),
    "end_overfit": (
        "- Runs that overfit after their best epoch: {count} of {runs}.",
        "- 最良エポックの後に過学習が見られた実験: {count}/{runs}件。",
    ),
    "updated": ("*Last updated: {date}*", "*最終更新: {date}*"),
}
