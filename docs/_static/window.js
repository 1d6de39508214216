// The explorer of attention on the site: choose a token, a head, and whose contexts the bars show.
// `make outputs` writes its data, window-data.js.
(() => {
  const data = document.currentScript.src.replace("window.js", "window-data.js");
  const SOURCES = { own: "this conversation", other: "another conversation" };
  const element = (name, properties = {}, parent = null) => {
    const made = Object.assign(document.createElement(name), properties);
    if (parent) parent.append(made);
    return made;
  };
  const percent = (share) => (share < 0.05 ? "< 0.1%" : `${share.toFixed(1)}%`);
  const quoted = (token) => `“${token.replace("\n", "↵").replaceAll(" ", "\u00a0")}”`;

  // The most certain of the right guesses, but no line break.
  function firstShown({ first, start, tokens, positions }) {
    const certainty = ({ own }, n) =>
      own.next[1] === 1 && tokens[first - start + n + 1] !== "\n" ? own.next[0] : 0;
    const values = positions.map(certainty);
    return values.indexOf(Math.max(...values));
  }

  // Attention by slot in percent: the mean of all heads for `head` 0, otherwise of the one head.
  function attention({ weights }, head) {
    const rows = head ? [weights[head - 1]] : weights;
    return rows[0].map((_, slot) => rows.reduce((sum, row) => sum + row[slot], 0) / rows.length / 10);
  }

  // Scroll `box` as far as needed, so that `item` lies in it.
  function bringIntoView(item, box) {
    const inner = item.getBoundingClientRect(), outer = box.getBoundingClientRect();
    if (inner.top < outer.top || inner.bottom > outer.bottom)
      box.scrollBy({ top: (inner.top + inner.bottom - outer.top - outer.bottom) / 2, behavior: "instant" });
  }

  function choice(parent, name, options, onchange) {
    const label = element("label", { textContent: `${name} ` }, parent);
    const select = element("select", {}, label);
    options.forEach((textContent) => element("option", { textContent }, select));
    select.onchange = () => onchange(select.selectedIndex);
  }

  function build(place) {
    const { start, first, tokens, offsets, positions } = window.attention;
    const heads = positions[0].own.weights.length, uniform = 100 / offsets.length;
    // The axis stays the same for all tokens and both conversations. The mean of all heads needs a shorter axis.
    const highest = Math.max(...positions.flatMap(({ own, other }) => [...attention(own, 0), ...attention(other, 0)]));
    const top = (head) => (head ? 100 : 5 * Math.ceil(highest / 5));
    let chosen = firstShown(window.attention), head = 0, source = "own";
    place.replaceChildren();

    const controls = element("div", { className: "window-controls" }, place);
    const names = ["the mean of all heads", ...Array.from({ length: heads }, (_, n) => `head ${n}`)];
    choice(controls, "Attention of", names, (index) => { head = index; show(chosen); });
    choice(controls, "to contexts of", Object.values(SOURCES), (index) => {
      source = Object.keys(SOURCES)[index];
      show(chosen);
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
    const axis = element("small", { className: "window-top" }, chart);
    const bars = element("div", { className: "window-bars", role: "toolbar" }, chart);
    bars.ariaLabel = "Attention by distance: the arrow keys move between the bars";
    const line = element("b", {}, element("div", { className: "window-levels" }, bars));
    const slots = offsets.map((offset, slot) => {
      const bar = element("button", { type: "button", tabIndex: slot ? -1 : 0, onclick: () => lead(slot) }, bars);
      element("i", {}, bar);
      if (slot % 8 === 0 || slot === offsets.length - 1)
        element("small", { textContent: offset || "now" }, bar);
      return bar;
    });
    bars.onkeydown = (event) => {
      const at = slots.indexOf(document.activeElement), last = slots.length - 1;
      const to = { ArrowLeft: at + 1, ArrowRight: at - 1, Home: last, End: 0 }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      lead(Math.max(0, Math.min(last, to)));
    };
    const note = element("small", {}, place);
    const says = element("p", { className: "window-says", role: "status" }, place);
    const table = element("table", { className: "window-guesses" }, place);

    // Mark a bar and its token. Contexts of another conversation have no token in this text.
    function lead(slot) {
      slots.forEach((bar, n) => Object.assign(bar, { tabIndex: n === slot ? 0 : -1, ariaPressed: `${n === slot}` }));
      slots[slot].focus();
      text.querySelector(".led")?.classList.remove("led");
      const span = spans[first - start + chosen - offsets[slot]];
      if (!span || source === "other") return;
      span.classList.add("led");
      bringIntoView(span, box);
    }

    function show(at) {
      chosen = Math.max(0, Math.min(positions.length - 1, at));
      const here = first - start + chosen, most = top(head);
      const shares = attention(positions[chosen][source], head);
      spans.forEach((span) => {
        span.style.background = span.title = "";
        span.classList.remove("now", "next", "led");
        if (span.role) span.ariaPressed = "false";
      });
      offsets.forEach((offset, slot) => {
        const words = `${offset} tokens back: ${percent(shares[slot])} of the attention`;
        Object.assign(slots[slot], { title: words, ariaLabel: words, ariaPressed: "false" });
        slots[slot].firstChild.style.height = `${(100 * shares[slot]) / most}%`;
        const span = spans[here - offset];
        if (!span || source === "other") return; // before the stream, or a context of other text
        span.title = words;
        span.style.background = `rgba(0, 114, 178, ${0.1 + 0.6 * Math.min(1, shares[slot] / 20)})`;
      });
      axis.textContent = `${most}% of the attention`;
      line.style.bottom = `${(100 * uniform) / most}%`;
      note.textContent = `Tokens back, up to “now”: the current token’s own context. Dashed: ${uniform.toFixed(1)}%, ` +
        "what each slot has if attention is uniform. " + (source === "own" ? "Click a bar to see its token."
          : "The tokens of the other conversation are not shown.");
      spans[here].classList.add("now");
      spans[here].ariaPressed = "true";
      spans[here + 1].classList.add("next");
      bringIntoView(spans[here], box);
      predict(tokens[here], tokens[here + 1]);
    }

    // Write what the model expects with its own contexts, and with contexts of another conversation.
    function predict(token, next) {
      const { own, other } = positions[chosen];
      says.textContent = `After ${quoted(token)} comes ${quoted(next)}. The model expects:`;
      table.replaceChildren();
      const add = (name, cells) => {
        const row = element("tr", {}, table);
        cells.forEach((textContent) => element(name, { textContent }, row));
        return row;
      };
      add("th", ["with contexts of", ...Object.values(SOURCES)]);
      own.guesses.forEach((_, n) => {
        const cells = [own, other].map(({ guesses }) => `${quoted(guesses[n][0])} ${percent(guesses[n][1])}`);
        add("td", [`guess ${n + 1}`, ...cells]);
      });
      const found = [own, other].map(({ next: [share, rank] }) =>
        `${percent(share)}, guess ${rank.toLocaleString("en")}`);
      add("td", [`true: ${quoted(next)}`, ...found]).className = "true";
    }

    show(chosen);
  }

  document.addEventListener("DOMContentLoaded", () => {
    const places = document.querySelectorAll(".window-explorer");
    if (!places.length) return;
    element("script", { src: data, onload: () => places.forEach(build) }, document.head);
  });
})();
