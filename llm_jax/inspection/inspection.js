"use strict";
// A click on a small map enlarges it; pointing at the large one names the two tokens and reads the share back.
const large = document.querySelector(".large");
const image = large.querySelector("img");
const place = large.querySelector(".place");
const tokens = JSON.parse(large.querySelector("script").textContent);
const maps = [...document.querySelectorAll(".map")];
let shades = null;

function read() {
  const canvas = document.createElement("canvas");
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, 0);
  shades = context.getImageData(0, 0, canvas.width, canvas.height).data;
}

function enlarge(map) {
  for (const other of maps) other.classList.toggle("chosen", other === map);
  shades = null;
  image.src = map.src;
  large.querySelector(".told").textContent = map.alt;
}

for (const map of maps) map.addEventListener("click", () => enlarge(map));
image.addEventListener("pointermove", (event) => {
  if (shades === null) read();
  const box = image.getBoundingClientRect();
  const at = (offset, size) => Math.min(tokens.length - 1, Math.max(0, Math.floor((offset / size) * tokens.length)));
  const t = at(event.clientY - box.top, box.height);
  const s = at(event.clientX - box.left, box.width);
  const share = (shades[4 * (t * tokens.length + s) + 3] / 255) ** 2;
  place.textContent = `${t} \u201c${tokens[t]}\u201d looks at ${s} \u201c${tokens[s]}\u201d: ${share.toFixed(2)}`;
});
enlarge(maps[0]);
