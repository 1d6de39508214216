// Sphinx marks the words of a search in the first `div.body`, or else in the whole page, where the hidden titles
// of Furo's icons make it fail.
document.querySelector(".article-container")?.classList.add("body");

// Long names in tables may break after a dot or an underscore, but no name breaks inside a word.
document.querySelectorAll("td code .pre").forEach((name) => {
  if (name.textContent.length > 20)
    name.innerHTML = name.innerHTML.replace(/\w[._](?=\w)/g, "$&<wbr>");
});

// The class `scrolls` marks a box that scrolls sideways; site.css writes a hint above its content.
(() => {
  const boxes = "figure, .cell_output, .table-wrapper, .highlight pre, div.math";
  const mark = (box) => box.classList.toggle("scrolls", box.scrollWidth > box.clientWidth + 4);
  const watch = new ResizeObserver((changes) =>
    requestAnimationFrame(() => changes.forEach(({ target }) => mark(target))));
  document.querySelectorAll(boxes).forEach((box) => watch.observe(box));
})();
