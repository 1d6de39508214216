// The explorer of attention on the site: click a token, choose a head and whose contexts are read.
// `make outputs` writes its data, window-data.js.
(() => {
  const data = document.currentScript.src.replace("window.js", "window-data.js");
  const element = (name, properties = {}, parent = null) => {
    const made = Object.assign(document.createElement(name), properties);
    if (parent) parent.append(made);
    return made;
  };
  const percent = (share) => (share < 0.05 ? "< 0.1%" : `${share.toFixed(1)}%`);
  const quoted = (token) => `“${token.replace("\n", "↵")}”`;

  // The most certain of the right guesses, but no line break.
  function firstShown({ first, start, tokens, positions }) {
    const certainty = ({ own }, n) =>
      own.next[1] === 1 && tokens[first - start + n + 1] !== "\n" ? own.next[0] : 0;
    const values = positions.map(certainty);
    return values.indexOf(Math.max(...values));
  }

  function build(place) {
    const { start, first, tokens, offsets, positions } = window.attention;
    const heads = positions[0].own.weights.length, uniform = 100 / offsets.length;
    let chosen = firstShown(window.attention), head = 0, source = "own";
    place.replaceChildren();

    const controls = element("div", { className: "window-controls" }, place);
    const label = element("label", { textContent: "Attention of " }, controls);
    const select = element("select", {}, label);
    ["the mean of all heads", ...Array.from({ length: heads }, (_, n) => `head ${n}`)]
      .forEach((textContent) => element("option", { textContent }, select));
    select.onchange = () => { head = select.selectedIndex; show(chosen); };
    const choice = element("fieldset", {}, controls);
    element("legend", { textContent: "Contexts of" }, choice);
    const conversations = { own: "this conversation", other: "another conversation" };
    Object.entries(conversations).forEach(([value, text]) => {
      const option = element("label", {}, choice);
      const onchange = () => { source = value; show(chosen); };
      element("input", { type: "radio", name: "window-source", checked: value === source, onchange }, option);
      option.append(` ${text}`);
    });

    const box = element("div", { className: "window-text", tabIndex: 0, role: "group" }, place);
    box.ariaLabel = "The text: choose an underlined token by a click or with the arrow keys";
    const text = element("p", {}, box);
    const spans = tokens.map((token, n) => {
      const at = n - (first - start);
      const span = element("span", { textContent: token.replace("\n", "↵\n") }, text);
      if (at >= 0 && at < positions.length) {
        const ariaLabel = `${quoted(token)}: show what the model expects after it`;
        Object.assign(span, { className: "token", role: "button", ariaLabel, onclick: () => show(at) });
      }
      return span;
    });
    box.onkeydown = (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (step) { event.preventDefault(); show(chosen + step); }
    };
    const steps = element("div", { className: "window-steps" }, place);
    [["← previous token", -1], ["next token →", 1]].forEach(([textContent, step]) =>
      element("button", { type: "button", textContent, onclick: () => show(chosen + step) }, steps));

    const chart = element("div", { className: "window-chart" }, place);
    const top = element("small", { className: "window-top" }, chart);
    const bars = element("div", { className: "window-bars" }, chart);
    const line = element("b", {}, element("div", { className: "window-levels" }, bars));
    const slots = offsets.map((offset, slot) => {
      const bar = element("button", { type: "button", onclick: () => lead(offset) }, bars);
      element("i", {}, bar);
      if (slot % 8 === 0 || slot === offsets.length - 1) element("small", { textContent: offset }, bar);
      return bar;
    });
    element("small", { textContent: "Tokens back: 0 is the current token’s own context. Dashed: " +
      `${uniform.toFixed(1)}%, what each slot has if attention is uniform. Click a bar to see its token.` }, place);
    const says = element("p", { className: "window-says", ariaLive: "polite" }, place);

    function lead(offset) {
      const span = spans[first - start + chosen - offset];
      if (!span) return; // a slot before the stream
      text.querySelector(".led")?.classList.remove("led");
      span.classList.add("led");
      const below = span.getBoundingClientRect().top - box.getBoundingClientRect().top;
      box.scrollBy({ top: below - box.clientHeight / 2, behavior: "smooth" });
    }

    function show(at) {
      chosen = Math.max(0, Math.min(positions.length - 1, at));
      const { weights, guesses, next } = positions[chosen][source];
      const share = (slot) => (head ? weights[head - 1][slot]
        : weights.reduce((sum, row) => sum + row[slot], 0) / heads) / 10; // in %
      const shares = offsets.map((_, slot) => share(slot)), most = Math.max(...shares, 2 * uniform);
      const here = first - start + chosen;
      spans.forEach((span) => {
        span.style.background = span.title = "";
        span.classList.remove("now", "next", "led");
        if (span.role) span.ariaPressed = "false";
      });
      offsets.forEach((offset, slot) => {
        const text = `${offset} tokens back: ${percent(shares[slot])} of the attention`;
        Object.assign(slots[slot], { title: text, ariaLabel: text });
        slots[slot].firstChild.style.height = `${(100 * shares[slot]) / most}%`;
        const span = spans[here - offset];
        if (!span || source === "other") return; // before the stream, or a context of other text
        span.title = text;
        span.style.background = `rgba(0, 114, 178, ${0.1 + (0.6 * shares[slot]) / most})`;
      });
      top.textContent = `${most.toFixed(0)}% of the attention`;
      line.style.bottom = `${(100 * uniform) / most}%`;
      spans[here].classList.add("now");
      spans[here].ariaPressed = "true";
      spans[here + 1].classList.add("next");
      says.textContent = `With contexts of ${conversations[source]}, the model expects after ${quoted(tokens[here])}: ` +
        `${guesses.map(([token, share]) => `${quoted(token)} ${percent(share)}`).join(", ")}. ` +
        `The next token is ${quoted(tokens[here + 1])} ${percent(next[0])}, ` +
        `number ${next[1].toLocaleString("en")} of the guesses.`;
    }
    show(chosen);
  }

  document.addEventListener("DOMContentLoaded", () => {
    const places = document.querySelectorAll(".window-explorer");
    if (!places.length) return;
    element("script", { src: data, onload: () => places.forEach(build) }, document.head);
  });
})();
