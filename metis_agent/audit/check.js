"use strict";
// Collects what was clicked, and saves it as one line of JSON a pair.
const pairs = [...document.querySelectorAll("li[data-turn]")];
const said = () => pairs.map((li) => {
  const chosen = li.querySelector("input:checked");
  return chosen && { turn: li.dataset.turn, state: Number(li.dataset.state), agrees: JSON.parse(chosen.value) };
}).filter(Boolean);
let saved = true;
document.addEventListener("change", () => {
  saved = false;
  document.getElementById("said").textContent = `${said().length} of ${pairs.length} said`;
});
document.getElementById("save").addEventListener("click", () => {
  const link = document.createElement("a");
  const lines = said().map((row) => JSON.stringify(row) + "\n").join("");
  link.href = URL.createObjectURL(new Blob([lines], { type: "application/jsonl" }));
  link.download = "checked.jsonl";
  link.click();
  URL.revokeObjectURL(link.href);
  saved = true;
});
window.addEventListener("beforeunload", (event) => { if (!saved) event.preventDefault(); });
