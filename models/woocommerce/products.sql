-- WooCommerce: one row per product or variation of the products export, and one per product that only orders know.
--
-- Export: Products > All Products > Export (CSV). Optional: without it, products are those of the orders.
-- The key of a product is its SKU, without one its ID, in orders without both the name of the item.
-- The category is the first one of the product or of a variation's parent, at its last level.
-- A stock below zero (on backorder) is 0, and a price of 0.00 is null.
-- A product that is not in the products export, or not published, is not active.
--
-- source products_export: wc-product-export*, products*, woocommerce_products*
-- columns products_export: ID, Type, SKU, Name, Published, Stock, Weight (kg), Sale price, Regular price, Categories
-- columns products_export: Parent
-- source orders: orders*, woocommerce_orders*, woocommerce-orders*
-- columns orders: item_product_id, item_name, item_sku

WITH parents AS (
    SELECT parent, MAX(Categories) AS categories
    FROM (
        SELECT concat('id:', ID) AS parent, Categories FROM products_export
        UNION ALL
        SELECT SKU AS parent, Categories FROM products_export
    )
    GROUP BY parent
),
catalogue AS (
    SELECT
        coalesce(nullif(trim(p.SKU), ''), trim(p.ID)) AS product_id,
        trim(p.Name) AS product_name,
        nullif(trim(regexp_extract(
            split_part(coalesce(nullif(p.Categories, ''), q.categories), ',', 1), '([^>]*)$', 1
        )), '') AS category,
        coalesce(nullif(trim(p.`Sale price`), ''), nullif(trim(p.`Regular price`), '')) AS price,
        nullif(trim(p.Stock), '') AS stock,
        nullif(trim(p.`Weight (kg)`), '') AS weight_kg,
        CASE trim(p.Published) WHEN '1' THEN 'true' WHEN '0' THEN 'false' WHEN '-1' THEN 'false' ELSE p.Published END
            AS is_active,
        p._delivery, p._source_file, p._source_row
    FROM products_export p
    LEFT JOIN parents q ON q.parent = p.Parent
    -- What is sold are the variations, not their parent.
    WHERE coalesce(lower(p.Type), '') NOT LIKE 'variable%' AND coalesce(lower(p.Type), '') NOT LIKE 'grouped%'
),
of_orders AS (
    SELECT *,
        ROW_NUMBER() OVER (PARTITION BY product_id ORDER BY _delivery DESC, _source_row DESC) AS recency
    FROM (
        SELECT
            coalesce(
                nullif(nullif(trim(item_sku), ''), 'unknown_product'),
                nullif(nullif(trim(item_product_id), ''), '0'),
                nullif(trim(item_name), '')
            ) AS product_id,
            trim(item_name) AS product_name,
            _delivery, _source_file, _source_row
        FROM orders
    )
    WHERE product_id IS NOT NULL
)
SELECT
    product_id, product_name, category,
    CASE WHEN try_cast(price AS DECIMAL(12, 2)) = 0 THEN NULL ELSE price END AS price,
    CASE WHEN try_cast(stock AS INT) < 0 THEN '0' ELSE stock END AS stock_quantity,
    weight_kg, is_active, _delivery, _source_file, _source_row
FROM catalogue
UNION ALL
SELECT
    o.product_id, o.product_name, CAST(NULL AS STRING) AS category,
    CAST(NULL AS STRING) AS price,
    CAST(NULL AS STRING) AS stock_quantity,
    CAST(NULL AS STRING) AS weight_kg,
    CASE WHEN n.products > 0 THEN 'false' END AS is_active,
    o._delivery, o._source_file, o._source_row
FROM of_orders o
CROSS JOIN (SELECT count(*) AS products FROM catalogue) n
LEFT ANTI JOIN catalogue c ON c.product_id = o.product_id
WHERE o.recency = 1
