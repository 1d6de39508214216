// A sign above what scrolls sideways: site.css writes it for this class.
(() => {
  const mark = () => document.querySelectorAll("figure, .cell_output, .table-wrapper, .highlight pre").forEach((box) =>
    box.classList.toggle("scrolls", box.scrollWidth > box.clientWidth + 4));
  window.addEventListener("load", mark);
  window.addEventListener("resize", mark);
})();
