
// Each method of the key can be switched off in every table and figure. Without this script the
// key is a legend.
const key = document.querySelector(".key");
key.classList.add("live");
for (const box of key.querySelectorAll("input")) {
  box.hidden = false;
  box.addEventListener("change", () => {
    for (const part of document.querySelectorAll(`[data-method="${box.value}"]`))
      part.classList.toggle("off", !box.checked);
  });
}
