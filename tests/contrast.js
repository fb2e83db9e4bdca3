// WCAG 2's contrast of every text in a page against what lies below its middle: HTML grounds and filled shapes of SVG.
(() => {
  const parse = (colour) => {
    const [r, g, b, a = 1] = colour.match(/[\d.]+/g).map(Number)
    return [r, g, b, a]
  }
  const over = (top, below) => top.slice(0, 3).map((one, n) => top[3] * one + (1 - top[3]) * below[n])
  const luminance = (rgb) => {
    const [r, g, b] = rgb.map((one) => one / 255).map((one) => (one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4))
    return 0.2126 * r + 0.7152 * g + 0.0722 * b
  }
  const layer = (element, x, y) => {
    const style = getComputedStyle(element)
    if (!(element instanceof SVGElement)) return parse(style.backgroundColor)
    if (!(element instanceof SVGGeometryElement) || style.fill === "none") return [0, 0, 0, 0]
    const point = new DOMPoint(x, y).matrixTransform(element.getScreenCTM().inverse())
    if (!element.isPointInFill(point)) return [0, 0, 0, 0]
    const [r, g, b, a] = parse(style.fill)
    return [r, g, b, a * Number(style.opacity)]
  }
  const ground = (element, x, y) => {
    const layers = []
    for (const one of document.elementsFromPoint(x, y)) {
      if (one instanceof SVGTextContentElement) continue
      layers.push(layer(one, x, y))
      if (layers.at(-1)[3] === 1) break
    }
    return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255])
  }
  const found = []
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT)
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const element = node.parentElement
    if (!node.data.trim() || element.closest("script, style")) continue
    element.scrollIntoView({ block: "center", inline: "center", behavior: "instant" })
    const range = document.createRange()
    range.selectNodeContents(node)
    const box = range.getClientRects()[0]
    if (!box) continue
    const svg = element instanceof SVGElement
    const style = getComputedStyle(element)
    const below = ground(element, box.x + box.width / 2, box.y + box.height / 2)
    const ink = over(parse(svg ? style.fill : style.color), below)
    const [dark, light] = [luminance(ink), luminance(below)].sort((a, b) => a - b)
    const size = parseFloat(style.fontSize) * (svg ? Math.hypot(element.getScreenCTM().a, element.getScreenCTM().b) : 1)
    const large = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700)
    found.push({
      text: node.data.trim(), svg, ratio: (light + 0.05) / (dark + 0.05), wanted: large ? 3 : 4.5,
      ground: `rgb(${below.map(Math.round).join(", ")})`, ink: `rgb(${ink.map(Math.round).join(", ")})`,
    })
  }
  return found
})()
