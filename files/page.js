"use strict";
for (const frame of document.querySelectorAll(".compare")) {  // before and after with a divider, and a zoom by the wheel
  const cut = frame.querySelector("input"), images = frame.querySelectorAll("img");
  let zoom = 1;
  cut.oninput = () => frame.style.setProperty("--cut", cut.value + "%");
  const place = event => {
    const box = frame.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width * 100 + "% " + (event.clientY - box.top) / box.height * 100 + "%";
    for (const image of images) {
      if (zoom == 1 || event.type == "wheel" && !image.style.transform) image.style.transformOrigin = at;
      image.style.transform = zoom == 1 ? "" : "scale(" + zoom + ")";
    }
  };
  frame.addEventListener("wheel", event => {
    if (!event.ctrlKey && !event.shiftKey) return;  // the wheel alone scrolls the page
    event.preventDefault();
    zoom = Math.min(16, Math.max(1, zoom * Math.exp(-event.deltaY / 300)));
    place(event);
  }, {passive: false});
  frame.addEventListener("dblclick", event => { zoom = zoom == 1 ? 4 : 1; place(event); });
}
for (const slider of document.querySelectorAll("input[data-of]")) {  // one picture of each series at a time
  const series = document.querySelectorAll(slider.dataset.of);
  slider.oninput = () => series.forEach(one => [...one.children].forEach((image, i) => image.classList.toggle("on", i == slider.value)));
}
for (const button of document.querySelectorAll("button[data-by]")) {  // rows in the order of a figure
  button.onclick = () => {
    const body = document.querySelector("tbody"), down = button.getAttribute("aria-pressed") != "down";
    const cell = row => [...row.querySelectorAll("[data-figure]")].find(one => one.dataset.figure == button.dataset.by);
    const value = row => cell(row) ? Number(cell(row).dataset.value) : NaN;
    const rows = [...body.rows].map(row => [value(row), row]);
    rows.sort((a, b) => isNaN(a[0]) - isNaN(b[0]) || (down ? b[0] - a[0] : a[0] - b[0]));
    body.append(...rows.map(row => row[1]));
    document.querySelectorAll("button[data-by]").forEach(other => other.removeAttribute("aria-pressed"));
    button.setAttribute("aria-pressed", down ? "down" : "up");
  };
}
