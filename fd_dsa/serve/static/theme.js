// Light or dark colours: the system's at first, then those that the reader selects.

import { load, save } from "./storage.js";

const KEPT = "fd_dsa.theme";
const THEMES = ["light", "dark"];
let selected = load("localStorage", KEPT, "");

// "" follows the system.
export const selectedTheme = () => (THEMES.includes(selected) ? selected : "");

export const isDark = () =>
  (selectedTheme() || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";

export function applyTheme() {
  document.documentElement.dataset.theme = selectedTheme();
}

export function selectTheme(theme) {
  selected = theme;
  save("localStorage", KEPT, theme);
  applyTheme();
}
