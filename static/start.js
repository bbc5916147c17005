// Runs before the first paint: a chosen theme does not flash, and no module waits for another.
try {
  for (const name of ["theme", "contrast"]) {
    const value = localStorage.getItem(`schedulezero.${name}`);
    if (value) document.documentElement.dataset[name] = value;
  }
} catch {
  // Storage may be forbidden; the page then follows the system.
}
const modules = `
  actions api audit charts commands dialogs dom draft executions form format handlers keys live
  model overview page palette pieces resources schedules settings shell stream
`;
for (const name of modules.trim().split(/\s+/)) {
  const link = Object.assign(document.createElement("link"), { rel: "modulepreload" });
  document.head.append(Object.assign(link, { href: `${name}.js` }));
}
