// Values kept in the browser.

// Webstorage may be forbidden, full, or written by another page of this address.
export function load(store, key, fallback) {
  try { return JSON.parse(window[store].getItem(key)) ?? fallback; } catch { return fallback; }
}

export function save(store, key, value) {
  try { window[store].setItem(key, JSON.stringify(value)); } catch { /* this tab has it */ }
}
