// The explorer of attention on the site: click a token, choose a head. `make outputs` writes its data, window-data.js.
(() => {
  const data = document.currentScript.src.replace("window.js", "window-data.js");
  const element = (name, properties = {}, parent = null) => {
    const made = Object.assign(document.createElement(name), properties);
    if (parent) parent.append(made);
    return made;
  };

  function build(place) {
    const { start, first, tokens, offsets, positions } = window.attention;
    const heads = positions[0].weights.length;
    let chosen = Math.floor(positions.length / 2), head = 0;
    place.replaceChildren();
    const label = element("label", { textContent: "Attention of " }, place);
    const select = element("select", {}, label);
    ["the mean of all heads", ...Array.from({ length: heads }, (_, n) => `head ${n}`)]
      .forEach((textContent) => element("option", { textContent }, select));
    const box = element("div", { className: "window-text", tabIndex: 0 }, place);
    const text = element("p", {}, box);
    const spans = tokens.map((token, n) => {
      const at = n - (first - start);
      const clickable = at >= 0 && at < positions.length;
      const span = element("span", { textContent: token.replace("\n", "↵\n") }, text);
      if (clickable) {
        span.className = "token";
        span.onclick = () => show(at);
      }
      return span;
    });
    const bars = element("div", { className: "window-bars" }, place);
    const slots = offsets.map(() => element("i", {}, bars));
    const uniform = 100 / offsets.length;
    const line = element("b", { title: `uniform: ${uniform.toFixed(1)}%` }, bars);
    element("small", { textContent: `Left: the token's own context; right: ${offsets.at(-1)} tokens back. Line: ` +
      `${uniform.toFixed(1)}%, as each slot would have if attention were uniform.` }, place);
    const says = element("p", { className: "window-says", ariaLive: "polite" }, place);

    function show(at) {
      chosen = Math.max(0, Math.min(positions.length - 1, at));
      const { weights, guesses, next } = positions[chosen];
      const share = (slot) => (head ? weights[head - 1][slot]
        : weights.reduce((sum, row) => sum + row[slot], 0) / heads) / 10; // in %
      const shares = offsets.map((_, slot) => share(slot)), most = Math.max(...shares, 2 * uniform);
      const here = first - start + chosen;
      spans.forEach((span) => { span.style.background = span.title = ""; span.classList.remove("now", "next"); });
      offsets.forEach((offset, slot) => {
        const says = `${offset} tokens back: ${shares[slot].toFixed(1)}% of the attention`;
        Object.assign(slots[slot], { title: says }).style.height = `${(100 * shares[slot]) / most}%`;
        const span = spans[here - offset];
        if (!span) return; // a slot before the stream
        span.title = says;
        span.style.background = `rgba(0, 114, 178, ${0.1 + (0.6 * shares[slot]) / most})`;
      });
      line.style.bottom = `${(100 * uniform) / most}%`;
      spans[here].classList.add("now");
      spans[here + 1].classList.add("next");
      const quoted = (token, share) => `“${token.replace("\n", "↵")}” ${share || "< 0.1"}%`;
      says.textContent = `After “${tokens[here].replace("\n", "↵")}” the model expects ` +
        `${guesses.map(([token, share]) => quoted(token, share)).join(", ")}. ` +
        `The next token is ${quoted(tokens[here + 1], next[0])}, number ${next[1].toLocaleString("en")} of the guesses.`;
    }
    select.onchange = () => { head = select.selectedIndex; show(chosen); };
    box.onkeydown = (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (step) { event.preventDefault(); show(chosen + step); }
    };
    show(chosen);
  }

  document.addEventListener("DOMContentLoaded", () => {
    const places = document.querySelectorAll(".window-explorer");
    if (!places.length) return;
    element("script", { src: data, onload: () => places.forEach(build) }, document.head);
  });
})();
