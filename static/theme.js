// Runs before the first paint, so that a chosen theme does not flash.
try {
  for (const name of ["theme", "contrast"]) {
    const value = localStorage.getItem(`schedulezero.${name}`);
    if (value) document.documentElement.dataset[name] = value;
  }
} catch {
  // Storage may be forbidden; the page then follows the system.
}
