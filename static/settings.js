// What the user prefers, kept in the browser.

export const CHOICES = {
  theme: ["auto", "light", "dark"],
  contrast: ["auto", "more", "less"],
  zone: ["server", "browser", "UTC"],
  keys: ["on", "off"],
};

/** Settings that fall back to their first choice; in memory only, where storage is forbidden. */
export function createSettings(storage) {
  const held = {};
  const get = (name) => held[name] ?? read(storage, name) ?? CHOICES[name][0];
  const set = (name, value) => {
    held[name] = value;
    try {
      storage.setItem(`schedulezero.${name}`, value);
    } catch {
      // Forbidden or full: the choice lasts as long as the page.
    }
  };
  const next = (name) => {
    const choices = CHOICES[name];
    set(name, choices[(choices.indexOf(get(name)) + 1) % choices.length]);
    return get(name);
  };
  return { get, set, next };
}

/** Put theme and contrast on the root element; without a choice the system's wish counts. */
export function showLook(settings, root, wantsContrast) {
  root.dataset.theme = settings.get("theme");
  root.dataset.contrast =
    { auto: wantsContrast ? "more" : "less" }[settings.get("contrast")] ?? settings.get("contrast");
}

function read(storage, name) {
  try {
    const value = storage.getItem(`schedulezero.${name}`);
    return CHOICES[name].includes(value) ? value : null;
  } catch {
    return null;
  }
}
