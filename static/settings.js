// What the user prefers, kept in the browser.

const CHOICES = {
  theme: ["auto", "light", "dark"],
  contrast: ["auto", "more", "less"],
  zone: ["server", "browser", "UTC"],
  keys: ["on", "off"],
};

/** Settings that fall back to their first choice; in memory only, where storage is forbidden. */
export function createSettings(storage) {
  const held = {};
  const use = (verb, name, ...value) => {
    try {
      return storage[verb](`schedulezero.${name}`, ...value);
    } catch {
      return null; // Forbidden or full: a choice lasts as long as the page.
    }
  };
  const get = (name) => {
    const value = held[name] ?? use("getItem", name);
    return CHOICES[name].includes(value) ? value : CHOICES[name][0];
  };
  const next = (name) => {
    const choices = CHOICES[name];
    held[name] = choices[(choices.indexOf(get(name)) + 1) % choices.length];
    use("setItem", name, held[name]);
    return held[name];
  };
  return { get, next };
}

/** Put theme and contrast on the root element; without a choice the system's wish counts. */
export function showLook(settings, root, wantsContrast) {
  const contrast = settings.get("contrast");
  root.dataset.theme = settings.get("theme");
  root.dataset.contrast = contrast === "auto" ? (wantsContrast ? "more" : "less") : contrast;
}
