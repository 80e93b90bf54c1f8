// Language and theme, applied before the browser shows the page, and the fields that change them.

import { $ } from "./dom.js";
import { selectLanguage, selectedLanguage, translate } from "./language.js";
import { applyTheme, selectTheme, selectedTheme } from "./theme.js";

applyTheme();
translate();
$("language").value = selectedLanguage();
$("theme").value = selectedTheme();
$("language").addEventListener("change", () => selectLanguage($("language").value));
$("theme").addEventListener("change", () => selectTheme($("theme").value));
