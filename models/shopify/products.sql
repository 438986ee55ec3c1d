-- Shopify: one row per variant of the products export, and one per product that only orders know.
--
-- Export: Admin > Products > Export. Optional: without it, products are those of the orders.
-- The key of a product is its SKU, or without one the name of the order line: "Title - Option 1 / Option 2".
-- Only the first row of a handle has title, vendor, type and status. Rows that only hold an image are left out.
-- The category is the shop's Type, or without one the last level of the Product Category.
-- A stock below zero (oversold) is 0, and a price of 0.00 (a free gift) is null.
-- A product that is not in the products export, or not active in it, is not active.
--
-- source products_export: products*, shopify_products*
-- columns products_export: Handle, Title, Vendor, Product Category, Type, Published, Option1 Value, Option2 Value
-- columns products_export: Option3 Value, Variant SKU, Variant Grams, Variant Inventory Qty, Variant Price, Status
-- source orders: orders*, shopify_orders*
-- columns orders: Name, Created at, Lineitem name, Lineitem price, Lineitem sku, Vendor

-- MAX finds the fields of the handle: its other rows have none.
WITH handles AS (
    SELECT
        Handle, _delivery,
        MAX(trim(Title)) AS title,
        nullif(MAX(trim(Vendor)), '') AS vendor,
        coalesce(nullif(MAX(trim(Type)), ''), nullif(trim(regexp_extract(MAX(`Product Category`), '([^>]*)$', 1)), ''))
            AS category,
        nullif(MAX(lower(trim(Status))), '') AS product_status,
        nullif(MAX(lower(trim(Published))), '') AS published
    FROM products_export
    GROUP BY Handle, _delivery
),
variants AS (
    SELECT
        h.*,
        nullif(regexp_replace(trim(v.`Variant SKU`), "^'", ''), '') AS sku,
        trim(concat_ws(
            ' - ',
            nullif(h.title, ''),
            nullif(concat_ws(
                ' / ',
                nullif(nullif(v.`Option1 Value`, 'Default Title'), ''),
                nullif(v.`Option2 Value`, ''),
                nullif(v.`Option3 Value`, '')
            ), '')
        )) AS variant_name,
        nullif(trim(v.`Variant Price`), '') AS price,
        nullif(trim(v.`Variant Inventory Qty`), '') AS stock,
        try_cast(v.`Variant Grams` AS DECIMAL(12, 3)) AS grams,
        v._source_file, v._source_row
    FROM products_export v
    JOIN handles h ON h.Handle = v.Handle AND h._delivery = v._delivery
),
catalogue AS (
    SELECT
        coalesce(sku, variant_name) AS product_id,
        variant_name AS product_name,
        category,
        CASE WHEN try_cast(price AS DECIMAL(12, 2)) = 0 THEN NULL ELSE price END AS price,
        CASE WHEN try_cast(stock AS INT) < 0 THEN '0' ELSE stock END AS stock_quantity,
        vendor AS supplier,
        CASE WHEN grams > 0 THEN CAST(CAST(grams / 1000 AS DECIMAL(12, 3)) AS STRING) END AS weight_kg,
        CASE coalesce(product_status, published)
            WHEN 'active' THEN 'true' WHEN 'draft' THEN 'false' WHEN 'archived' THEN 'false'
            ELSE coalesce(product_status, published)
        END AS is_active,
        _delivery, _source_file, _source_row
    FROM variants
    WHERE price IS NOT NULL OR sku IS NOT NULL
),
of_orders AS (
    SELECT *,
        ROW_NUMBER() OVER (PARTITION BY product_id ORDER BY _delivery DESC, _source_row DESC) AS recency
    FROM (
        SELECT
            coalesce(nullif(regexp_replace(trim(`Lineitem sku`), "^'", ''), ''), trim(`Lineitem name`)) AS product_id,
            trim(`Lineitem name`) AS product_name,
            CASE WHEN try_cast(`Lineitem price` AS DECIMAL(12, 2)) = 0 THEN NULL ELSE `Lineitem price` END AS price,
            nullif(trim(Vendor), '') AS supplier,
            _delivery, _source_file, _source_row
        FROM orders
    )
    WHERE product_id <> ''
)
SELECT
    product_id, product_name, category, price, stock_quantity, supplier, weight_kg, is_active,
    _delivery, _source_file, _source_row
FROM catalogue
UNION ALL
SELECT
    o.product_id, o.product_name, CAST(NULL AS STRING) AS category, o.price, CAST(NULL AS STRING) AS stock_quantity,
    o.supplier, CAST(NULL AS STRING) AS weight_kg,
    CASE WHEN n.variants > 0 THEN 'false' END AS is_active,
    o._delivery, o._source_file, o._source_row
FROM of_orders o
CROSS JOIN (SELECT count(*) AS variants FROM catalogue) n
LEFT ANTI JOIN catalogue c ON c.product_id = o.product_id
WHERE o.recency = 1
