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
  const get = (name) => held[name] ?? read(storage, name) ?? CHOICES[name][0];
  const next = (name) => {
    const choices = CHOICES[name];
    held[name] = choices[(choices.indexOf(get(name)) + 1) % choices.length];
    try {
      storage.setItem(`schedulezero.${name}`, held[name]);
    } catch {
      // Forbidden or full: the choice lasts as long as the page.
    }
    return held[name];
  };
  return { get, next };
}

function read(storage, name) {
  try {
    const value = storage.getItem(`schedulezero.${name}`);
    return CHOICES[name].includes(value) ? value : null;
  } catch {
    return null;
  }
}

/** Put theme and contrast on the root element; without a choice the system's wish counts. */
export function showLook(settings, root, wantsContrast) {
  const contrast = settings.get("contrast");
  root.dataset.theme = settings.get("theme");
  root.dataset.contrast = contrast === "auto" ? (wantsContrast ? "more" : "less") : contrast;
}
